/* The thread pool of compiled code on Linux; `dcnv3_tvm.runtime.thread_pool` uses it.

   TVM's pool belongs to one calling thread, does not survive a fork, and waits by sched_yield. This
   one belongs to the process: a parallel loop runs on the calling thread and on as many workers as
   there are cores that no other loop uses. Without any, the caller does all of it, so that no loop
   waits for a thread that the system does not start or run. A child of a fork starts new workers.

   Every library has a copy of this code. The first one loaded runs the loops of all. */

#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* TVM's types (c_backend_api.h, tvm/ffi/c_api.h). */
typedef struct {
  void *sync_handle;
  int32_t num_task;
} Group;
typedef int (*Body)(int task, Group *group, void *data);
typedef int (*Launch)(Body body, void *data, int tasks);
typedef struct {
  int32_t type_index;
  uint32_t padding;
  int64_t value;
} Any;
enum { TYPE_INT = 1 };

/* This thread's error. */
extern void TVMFFIErrorMoveFromRaised(void **error);
extern void TVMFFIErrorSetRaised(void *error);
extern int TVMFFIObjectDecRef(void *object);

/* What runs this library's loops; TVM sets it when it loads the library. Without loops there is none. */
extern __attribute__((weak)) Launch __TVMBackendParallelLaunch;

/* What glibc 2.32 and 2.34 moved to libc, in its first version: a library loads where glibc is older
   than where it was linked. Without libc it is linked to no version. */
#if defined(LINKED_TO_LIBC) && defined(__GLIBC__)
#if defined(__x86_64__)
#define FIRST "@GLIBC_2.2.5"
#elif defined(__aarch64__)
#define FIRST "@GLIBC_2.17"
#endif
#endif
#ifdef FIRST
__asm__(".symver pthread_create, pthread_create" FIRST);
__asm__(".symver pthread_detach, pthread_detach" FIRST);
__asm__(".symver pthread_sigmask, pthread_sigmask" FIRST);
#endif

/* pthread_atfork is in no shared library of glibc. */
extern int __register_atfork(void (*)(void), void (*)(void), void (*child)(void), void *);

#define EXPORT __attribute__((visibility("default")))
#define CACHE_LINES __attribute__((aligned(128)))

enum { SPIN_NANOSECONDS = 100000, SPINS_PER_LOOK = 32 };

typedef struct {
  Body body;
  void *data;
  Group group;
  CACHE_LINES atomic_int next_task; /* Of those that no thread begins with. */
  atomic_bool failed;
  _Atomic(void *) error; /* Of the first task that failed. */
} Loop;

/* What a worker does. Its thread waits for TODO; a caller waits for the end of RUNNING. Either makes
   that visible by ASLEEP or AWAITED before it sleeps, so that the other wakes it. */
enum { IDLE, ASLEEP, TODO, RUNNING, AWAITED };

typedef struct Worker {
  CACHE_LINES atomic_int state;
  Loop *loop; /* These two are for the worker from TODO on, until it is idle again. */
  int first_task;
  struct Worker *next;
  atomic_int thread; /* For sched_setaffinity. */
  atomic_bool restricted;
  cpu_set_t cores; /* To run on again, while restricted. */
} Worker;

static struct {
  CACHE_LINES atomic_bool locked; /* The rest, but `busy`. */
  int cores;
  int workers;
  Worker *idle;
  CACHE_LINES atomic_int busy; /* Threads within loops. */
} pool;

static _Thread_local int threads_of_caller = 1;

static void pause_core(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb"); /* `yield` does nothing on most cores. */
#endif
}

static int64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void sleep_while(atomic_int *state, int value) {
  syscall(SYS_futex, state, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(atomic_int *state) { syscall(SYS_futex, state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0); }

/* Wake a worker on another core than this one. Where no core is idle, the system may choose this one,
   on which the worker would wait for the caller to end, again and again. */
static void wake_elsewhere(Worker *worker) {
  int here = sched_getcpu(), thread = atomic_load(&worker->thread);
  bool known = atomic_load(&worker->restricted) ||
               sched_getaffinity(thread, sizeof worker->cores, &worker->cores) == 0;
  if (known && here >= 0 && CPU_ISSET(here, &worker->cores) && CPU_COUNT(&worker->cores) > 1) {
    cpu_set_t others = worker->cores;
    CPU_CLR(here, &others);
    atomic_store(&worker->restricted, sched_setaffinity(thread, sizeof others, &others) == 0);
  }
  wake(&worker->state);
}

static void lift_restriction(Worker *worker) {
  if (!atomic_load(&worker->restricted)) return;
  sched_setaffinity(0, sizeof worker->cores, &worker->cores);
  atomic_store(&worker->restricted, false);
}

/* Wait for a short time while a worker is in a state, and only while enough cores are free that the
   thread waited for can run. */
static void spin_while(atomic_int *state, int value, int busy_limit) {
  int64_t end = nanoseconds() + SPIN_NANOSECONDS;
  do {
    for (int spin = 0; spin < SPINS_PER_LOOK; spin++) {
      if (atomic_load_explicit(state, memory_order_acquire) != value) return;
      pause_core();
    }
  } while (atomic_load_explicit(&pool.busy, memory_order_relaxed) <= busy_limit && nanoseconds() < end);
}

static void lock_pool(void) {
  while (atomic_exchange_explicit(&pool.locked, true, memory_order_acquire)) sched_yield();
}

static void unlock_pool(void) { atomic_store_explicit(&pool.locked, false, memory_order_release); }

/* Make the pool empty: at first, and in a forked child, where the workers are missing and a thread of
   the parent may hold the lock. */
static void reset_pool(void) {
  cpu_set_t cores;
  /* It fails on machines with more cores than fit the set. */
  pool.cores = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores)
                                                               : (int)sysconf(_SC_NPROCESSORS_ONLN);
  pool.workers = 0;
  pool.idle = NULL;
  atomic_store(&pool.busy, 0);
  unlock_pool();
}

static void keep_error(Loop *loop) {
  void *error = NULL, *none = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  atomic_store(&loop->failed, true);
  if (error != NULL && !atomic_compare_exchange_strong(&loop->error, &none, error))
    TVMFFIObjectDecRef(error);
}

static void run_tasks(Loop *loop, int task) {
  do {
    if (loop->body(task, &loop->group, loop->data) != 0) keep_error(loop);
    task = atomic_fetch_add_explicit(&loop->next_task, 1, memory_order_relaxed);
  } while (task < loop->group.num_task);
}

static void *work(void *argument) {
  Worker *worker = argument;
  atomic_store(&worker->thread, (int)syscall(SYS_gettid));
  for (;;) {
    int state = TODO;
    if (atomic_compare_exchange_strong(&worker->state, &state, RUNNING)) {
      run_tasks(worker->loop, worker->first_task);
      atomic_fetch_sub(&pool.busy, 1);
      if (atomic_exchange(&worker->state, IDLE) == AWAITED) wake(&worker->state);
    } else if (state == IDLE) {
      lift_restriction(worker);
      spin_while(&worker->state, IDLE, pool.cores - 1);
      atomic_compare_exchange_strong(&worker->state, &state, ASLEEP);
    } else {
      sleep_while(&worker->state, ASLEEP);
    }
  }
  return NULL;
}

static Worker *start_worker(void) {
  static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  Worker *worker = aligned_alloc(_Alignof(Worker), sizeof(Worker));
  if (worker == NULL) return NULL;
  atomic_init(&worker->state, IDLE);
  atomic_init(&worker->restricted, false);
  pthread_t thread;
  sigset_t others, before; /* Signals are for the program's own threads, but for faults. */
  sigfillset(&others);
  for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&others, faults[i]);
  pthread_sigmask(SIG_SETMASK, &others, &before);
  int error = pthread_create(&thread, NULL, work, worker);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error != 0) {
    free(worker);
    return NULL;
  }
  pthread_detach(thread);
  return worker;
}

/* Return up to `wanted` workers, the one used last first; they count as busy. */
static Worker *take_workers(int wanted) {
  lock_pool();
  int free_cores = pool.cores - atomic_fetch_add(&pool.busy, 1) - 1;
  if (wanted > free_cores) wanted = free_cores;
  Worker *taken = NULL, **end = &taken;
  for (; wanted > 0; wanted--) {
    Worker *worker = pool.idle;
    if (worker != NULL) {
      pool.idle = worker->next;
    } else {
      worker = pool.workers < pool.cores ? start_worker() : NULL;
      if (worker == NULL) break;
      pool.workers++;
    }
    atomic_fetch_add(&pool.busy, 1);
    *end = worker;
    end = &worker->next;
  }
  *end = NULL;
  unlock_pool();
  return taken;
}

/* Return workers in their order, so that a thread gets the same part of the next loop: its cache
   holds what it has written. */
static void return_workers(Worker *first) {
  lock_pool();
  Worker **end = &first;
  while (*end != NULL) end = &(*end)->next;
  *end = pool.idle;
  pool.idle = first;
  atomic_fetch_sub(&pool.busy, 1);
  unlock_pool();
}

static void finish(Worker *worker) {
  int state = TODO;
  if (atomic_compare_exchange_strong(&worker->state, &state, IDLE)) { /* It has not begun. */
    atomic_fetch_sub(&pool.busy, 1);
    run_tasks(worker->loop, worker->first_task);
    return;
  }
  if (state == RUNNING) spin_while(&worker->state, RUNNING, pool.cores);
  state = RUNNING;
  if (atomic_compare_exchange_strong(&worker->state, &state, AWAITED))
    do sleep_while(&worker->state, AWAITED);
    while (atomic_load(&worker->state) == AWAITED);
}

/* TVM's TVMBackendParallelLaunch. */
static int launch(Body body, void *data, int tasks) {
  Loop loop = {.body = body, .data = data};
  loop.group.num_task = tasks > 0 ? tasks : threads_of_caller;
  if (loop.group.num_task == 1) return body(0, &loop.group, data);
  Worker *workers = take_workers(loop.group.num_task - 1);
  int started = 1;
  for (Worker *worker = workers; worker != NULL; worker = worker->next) {
    worker->loop = &loop;
    worker->first_task = started++;
  }
  atomic_init(&loop.next_task, started);
  for (Worker *worker = workers; worker != NULL; worker = worker->next)
    if (atomic_exchange(&worker->state, TODO) == ASLEEP) wake_elsewhere(worker);
  run_tasks(&loop, 0);
  for (Worker *worker = workers; worker != NULL; worker = worker->next) finish(worker);
  return_workers(workers);
  if (!atomic_load(&loop.failed)) return 0;
  void *error = atomic_load(&loop.error);
  if (error != NULL) {
    TVMFFIErrorSetRaised(error);
    TVMFFIObjectDecRef(error);
  }
  return -1;
}

/* Functions of the library, as TVM calls them. */

/* Run the library's loops by the pool with the launch function at an address, or if that is 0 by its
   own, which the process has to keep; return the address. */
EXPORT int __tvm_ffi_dcnv3_join_pool(void *self, const Any *arguments, int32_t count, Any *result) {
  (void)self, (void)count;
  Launch chosen = (Launch)(intptr_t)arguments[0].value;
  if (chosen == NULL) {
    chosen = launch;
    reset_pool();
    __register_atfork(NULL, NULL, reset_pool, NULL);
  }
  if (&__TVMBackendParallelLaunch != NULL) __TVMBackendParallelLaunch = chosen;
  result->type_index = TYPE_INT;
  result->value = (intptr_t)chosen;
  return 0;
}

/* Run loops that this thread calls on that many threads. */
EXPORT int __tvm_ffi_dcnv3_use_threads(void *self, const Any *arguments, int32_t count, Any *result) {
  (void)self, (void)count, (void)result;
  threads_of_caller = (int)arguments[0].value;
  return 0;
}
