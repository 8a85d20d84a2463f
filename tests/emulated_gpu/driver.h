/* What the emulated driver's files share: modules and memory (driver.c), and streams (streams.c). */

#pragma once

#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

/* Errors, with CUDA's numbers. */
enum { OK, INVALID = 1, OUT_OF_MEMORY, NOT_FOUND = 500, FAILED = 700, TOO_MANY_RESOURCES };
enum { NOT_IN_CAPTURE = 900, INVALIDATED, IMPLICIT = 906, WRONG_THREAD = 908 };

enum { MOST_PARAMETERS = 32 };

/* Entry function of a kernel compiled by `nvcc.py`. */
typedef const char *Run(const unsigned *config, void **parameters, int backwards);

typedef struct {
  char name[128];
  Run *run;                   /* NULL for machine code. */
  const int *parameter_bytes; /* Terminated by 0. */
  unsigned most_threads;      /* Of __launch_bounds__, or 0. */
  unsigned static_shared, most_shared;
} Function;

typedef struct {
  Function *function;
  unsigned config[7];
  uint64_t values[MOST_PARAMETERS];
  int backwards;
} Launch;

typedef struct {
  void *to, *from;
  void *staged; /* The bytes to copy, if `from` is memory of the host. */
  size_t size;
  int pageable; /* Whether a side is memory of the host, which is never pinned. */
} Copy;

typedef struct {
  intptr_t stream;
  long issued;
} Event;

/* Work of a stream. */
typedef struct Operation {
  enum { LAUNCH, COPY, WAIT } kind;
  intptr_t stream;
  long number; /* In the order in which all streams were given work. */
  union {
    Launch launch;
    Copy copy;
    Event event;
  };
  struct Operation *next;
} Operation;

/* Let no other thread enter until the end of the scope. */
#define ENTER __attribute__((cleanup(leave))) int entered = enter()
int enter(void);
void leave(int *entered);

void say(const char *format, ...);
size_t setting(const char *name, size_t otherwise);

/* Return the result of an operation of the runtime, or the fault that an earlier one left. */
int outcome(int error);

extern int fault; /* Error of all later operations, after a fault on the device. */
extern __thread int current_device;

/* Run a kernel. */
int compute(Launch *launch);

/* Return the number of a stream: of a default stream, a negative one for each device. */
intptr_t number_of(void *stream);

int is_captured(intptr_t stream);

/* Forbid a call during a capture, which it makes invalid; OK if there is none. */
int forbidden(int error);

/* Add an operation to a stream, or to the graph that it is captured into. */
int issue(Operation operation);

/* Finish all work of a stream until now, or of all. */
int finish_stream(intptr_t stream);
int finish_all(void);
