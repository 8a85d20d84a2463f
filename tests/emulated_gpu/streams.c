/* Streams, events, captures and graphs of the emulated driver.
 *
 * Operations of a stream run as late as possible: when the host or another stream waits for them; or
 * at once, if threads run backwards. So what nobody waits for is wrong in the former. If
 * FAKE_INTERLEAVED is 1, other streams then also do an operation after each, unless they wait.
 */

#include "driver.h"

#include <stdlib.h>
#include <string.h>

enum { BLOCKING = 1000, NONBLOCKING = 100000 }; /* The first streams of each kind. */
enum { MOST_NODES = 4096 };

typedef struct {
  Operation nodes[MOST_NODES];
  int count;
} Graph;

static Operation *pending; /* In order. */
static long issued;
static Graph *captured;
static intptr_t captured_stream;
static pthread_t capturing_thread;
static int is_invalid; /* Whether an operation broke the capture. */

/* The default stream of a device waits for blocking streams, and they for it. */
static int is_default(intptr_t stream) { return stream < 0; }
static int is_blocking(intptr_t stream) { return stream >= BLOCKING && stream < NONBLOCKING; }
intptr_t number_of(void *stream) { return stream ? (intptr_t)stream : -1 - current_device; }
int is_captured(intptr_t stream) { return captured && stream == captured_stream; }

/* Running what is pending. */

static int finish(intptr_t stream, long number);

static int perform(Operation *operation) {
  Copy *copy = &operation->copy;
  switch (operation->kind) {
    case LAUNCH:
      return compute(&operation->launch);
    case COPY:
      memcpy(copy->to, copy->staged ? copy->staged : copy->from, copy->size);
      return free(copy->staged), OK;
    case WAIT:
      return finish(operation->event.stream, operation->event.issued);
  }
  return INVALID;
}

/* Whether an operation in `stream` implicitly waits for an earlier one. */
static int is_awaited(const Operation *one, intptr_t stream, long number) {
  int related = is_default(stream) ? is_blocking(one->stream)
                                   : is_blocking(stream) && is_default(one->stream);
  return related && one->number < number;
}

static int finish_others(intptr_t stream, long number) {
  int result = OK;
  for (Operation *one = pending; one && one->number < number && result == OK;) {
    int awaited = is_awaited(one, stream, number);
    if (awaited) result = finish(one->stream, one->number);
    one = awaited ? pending : one->next;
  }
  return result;
}

static Operation *next_of(intptr_t stream, long number) {
  Operation *one = pending;
  while (one && one->stream != stream) one = one->next;
  return one && one->number <= number ? one : NULL;
}

static void forget(Operation *operation) {
  Operation **link = &pending;
  while (*link != operation) link = &(*link)->next;
  *link = operation->next;
  free(operation);
}

static int waits(const Operation *operation) {
  if (operation->kind == WAIT && next_of(operation->event.stream, operation->event.issued)) return 1;
  for (const Operation *one = pending; one; one = one->next) {
    if (is_awaited(one, operation->stream, operation->number)) return 1;
  }
  return 0;
}

/* Perform the next operation of every other stream that does not wait. */
static int step_others(intptr_t stream) {
  int result = OK;
  for (Operation *one = pending, *next; one && result == OK; one = next) {
    next = one->next;
    if (one->stream == stream || next_of(one->stream, one->number) != one || waits(one)) continue;
    while (next && next->stream == one->stream) next = next->next;
    Operation operation = *one;
    forget(one);
    result = perform(&operation);
  }
  return result;
}

/* Finish the operations in a stream up to one of them. */
static int finish(intptr_t stream, long number) {
  int result = OK;
  for (Operation *one; result == OK && (one = next_of(stream, number));) {
    Operation operation = *one;
    result = finish_others(stream, one->number);
    if (result != OK) break;
    forget(one);
    result = perform(&operation);
    if (result == OK && setting("FAKE_INTERLEAVED", 0)) result = step_others(stream);
  }
  if (result == OK) return finish_others(stream, number);
  while (pending) forget(pending); /* The GPU has failed. */
  return result;
}

int finish_stream(intptr_t stream) { return finish(stream, issued); }

int finish_all(void) {
  int result = OK;
  while (pending && result == OK) result = finish(pending->stream, pending->number);
  return result;
}

/* What a capture allows. */

int forbidden(int error) {
  if (!captured) return OK;
  say("capture broken\n");
  is_invalid = 1;
  return error;
}

/* Forbid a default stream during the capture of a blocking stream, for which it would wait. */
static int forbidden_on(intptr_t stream) {
  return is_default(stream) && is_blocking(captured_stream) ? forbidden(IMPLICIT) : OK;
}

int issue(Operation operation) {
  int wrong = forbidden_on(operation.stream);
  if (wrong) return wrong;
  if (is_captured(operation.stream)) {
    int fits = operation.kind == LAUNCH || (operation.kind == COPY && !operation.copy.pageable);
    if (!fits) return forbidden(NOT_IN_CAPTURE);
    if (captured->count == MOST_NODES) return INVALID;
    return captured->nodes[captured->count++] = operation, OK;
  }
  operation.number = ++issued;
  Operation **last = &pending;
  while (*last) last = &(*last)->next;
  *last = memcpy(malloc(sizeof operation), &operation, sizeof operation);
  return setting("FAKE_BACKWARDS", 0) ? finish(operation.stream, issued) : OK;
}

/* The runtime. */

static int create(void **stream, intptr_t *next) { return *stream = (void *)(*next)++, OK; }
int cudaStreamCreate(void **stream) {
  static intptr_t next = BLOCKING;
  return create(stream, &next);
}
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
  static intptr_t next = NONBLOCKING;
  return flags ? create(stream, &next) : cudaStreamCreate(stream);
}
int cudaStreamDestroy(void *stream) { return OK; }
int cudaStreamSynchronize(void *stream) {
  ENTER;
  intptr_t number = number_of(stream);
  say("sync %td\n", (intptr_t)stream);
  int wrong = is_captured(number) ? forbidden(NOT_IN_CAPTURE) : forbidden_on(number);
  return outcome(wrong || fault ? wrong : finish_stream(number));
}

int cudaEventCreate(Event **event) { return *event = calloc(1, sizeof **event), OK; }
int cudaEventDestroy(Event *event) { return free(event), OK; }
int cudaEventRecord(Event *event, void *stream) {
  ENTER;
  *event = (Event){number_of(stream), issued};
  int captured_here = is_captured(event->stream);
  return outcome(captured_here ? forbidden(NOT_IN_CAPTURE) : forbidden_on(event->stream));
}
int cudaEventSynchronize(Event *event) {
  ENTER;
  return outcome(finish(event->stream, event->issued));
}
int cudaEventElapsedTime(float *time, Event *start, Event *stop) { return *time = 1, OK; }
int cudaStreamWaitEvent(void *stream, Event *event, unsigned flags) {
  ENTER;
  intptr_t awaited = is_default(event->stream) ? 0 : event->stream;
  say("stream %td waits for %td\n", (intptr_t)stream, awaited);
  return outcome(issue((Operation){.kind = WAIT, .stream = number_of(stream), .event = *event}));
}

int cudaStreamBeginCapture(void *stream, int mode) {
  ENTER;
  if (captured) return outcome(NOT_IN_CAPTURE);
  captured = calloc(1, sizeof *captured);
  captured_stream = number_of(stream);
  capturing_thread = pthread_self();
  is_invalid = 0;
  return OK;
}
int cudaStreamEndCapture(void *stream, Graph **graph) {
  static size_t failed;
  ENTER;
  if (!is_captured(number_of(stream))) return outcome(INVALID);
  if (!pthread_equal(capturing_thread, pthread_self())) return outcome(WRONG_THREAD);
  int fails = is_invalid || setting("FAKE_INVALID_CAPTURES", 0) > failed;
  failed += fails;
  *graph = fails ? NULL : captured;
  if (fails) free(captured);
  captured = NULL;
  captured_stream = 0;
  return fails ? outcome(INVALIDATED) : OK;
}
int cudaGraphInstantiate(Graph **executable, Graph *graph, unsigned long long flags) {
  if (!graph) return outcome(INVALID);
  *executable = memcpy(malloc(sizeof *graph), graph, sizeof *graph);
  return OK;
}
int cudaGraphDestroy(Graph *graph) { return free(graph), OK; }
int cudaGraphExecDestroy(Graph *executable) {
  ENTER;
  if (fault) return outcome(OK);
  return say("graph destroyed\n"), free(executable), OK;
}
int cudaGraphLaunch(Graph *graph, void *stream) {
  ENTER;
  if (fault) return outcome(OK);
  say("graph of %d stream=%td\n", graph->count, (intptr_t)stream);
  int result = OK;
  for (int i = 0; i < graph->count && result == OK; ++i) {
    Operation node = graph->nodes[i];
    node.stream = number_of(stream);
    if (node.kind == LAUNCH) node.launch.backwards = setting("FAKE_BACKWARDS", 0);
    result = issue(node);
  }
  return outcome(result);
}
