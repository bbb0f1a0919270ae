/* Runs a static plan: kernels in order on one arena. The tables are generated, see plan.h.

   Kernels are TVM's; the few functions of TVM's runtime that they call are here: parallel loops on a pool of
   threads, memory for a task, and errors. Nothing else of TVM is needed. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "model.h"

typedef struct {
    void *data;
    struct { int32_t type, id; } device;
    int32_t dimensions;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;
    uint64_t offset;
} tensor_view;

typedef struct {
    int32_t type;
    uint32_t padding;
    void *pointer;
} argument;

typedef int (*kernel)(void *self, const argument *arguments, int32_t count, argument *result);

typedef struct { uint8_t kind, code, bits, dimensions; uint32_t extents; uint64_t position; } tensor_record;
typedef struct { kernel run; uint32_t count, first; } call_record;
typedef struct { uint32_t tensor, output; } copy_record;

/* What one kind of processor executes. */
typedef struct {
    const char *name;
    const tensor_record *tensors;
    const call_record *calls;
    const copy_record *copies;
    const uint32_t *arguments;
    const int64_t *extents;
    uint32_t tensor_count, call_count, copy_count;
    uint64_t arena_bytes;
} plan;

/* ---- processors ---------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* AMX-int8, with the kernel's permission to use tile registers. */
__attribute__((unused)) static int has_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return 0;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#elif defined(__aarch64__)
#include <sys/auxv.h>

__attribute__((unused)) static int has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }
#endif

#include "plan.h"

enum { CPU = 1, TENSOR = 7 /* kTVMFFIDLTensorPtr */ };

static _Thread_local char message[256];

const char *qcompile_error(void) { return message; }

/* ---- constants ---------------------------------------------------------------------------------------------- */

/* Where kernels read them: large ones in huge pages, which take a fifth of the time off reading them once. They
   stay for as long as the process does: threads may still run when it ends. */
static const unsigned char *constants = qcompile_constants;

static void place_constants(void) {
    const size_t huge = (size_t)2 << 20, page = 4096, size = CONSTANT_BYTES;
    if (size < 2 * huge) return;
    size_t bytes = (size + huge - 1) / huge * huge;
    unsigned char *given = mmap(NULL, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (given == MAP_FAILED) return;
    unsigned char *aligned = (unsigned char *)(((uintptr_t)given + huge - 1) / huge * huge);
    if (aligned > given) munmap(given, (size_t)(aligned - given));
    if (given + huge > aligned) munmap(aligned + bytes, (size_t)(given + huge - aligned));
    if (madvise(aligned, bytes, MADV_HUGEPAGE) != 0) {
        munmap(aligned, bytes);
        return;
    }
    for (size_t done = 0; done < size; done += huge) {
        const unsigned char *source = qcompile_constants + done;
        size_t count = size - done < huge ? size - done : huge;
        memcpy(aligned + done, source, count);
        /* what was read from the file needs no memory any more */
        uintptr_t first = ((uintptr_t)source + page - 1) / page * page;
        uintptr_t last = ((uintptr_t)source + count) / page * page;
        madvise((void *)first, last - first, MADV_DONTNEED);
    }
    mprotect(aligned, bytes, PROT_READ);
    constants = aligned;
}

static void place_constants_once(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, place_constants);
}

const void *qcompile_data(void) {
    place_constants_once();
    return constants;
}

size_t qcompile_data_bytes(void) { return CONSTANT_BYTES; }

/* ---- parallel loops ---------------------------------------------------------------------------------------- */

typedef struct { void *sync; int32_t tasks; } group;
typedef int (*task)(int index, group *environment, void *data);

/* Memory of one thread's tasks: a stack that is as large as the most that was needed, kept between calls. */
typedef struct {
    unsigned char *base;
    uint64_t size, used, wanted;
} stack;

/* A thread's share of the tasks: neighbours, in every kernel the same part of an image, so that it reads what it wrote
   itself. It is one word, so that what is taken from it belongs to the round that was seen: the round's number, the end
   of the share, and the next task. Who has finished takes from the others; a thread that wakes late finds nothing left,
   and nobody waits for it. */
enum { INDEX_BITS = 20 };
#define INDEX_MASK ((UINT64_C(1) << INDEX_BITS) - 1)

typedef struct { _Alignas(64) atomic_ullong tickets; } share;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t *threads;
    stack *stacks; /* of the calling thread, then of each of the others */
    share *shares; /* likewise */
    int count, stopping;
    task body;
    void *data;
    group environment;
    atomic_int finished, asleep, failed;
    char message[256];
} pool;

static _Thread_local pool *current;
static _Thread_local stack *memory;

static inline void pause_a_little(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static uint64_t round_of(const share *one) { return atomic_load(&one->tickets) >> 2 * INDEX_BITS; }

static void work(pool *p, int self) {
    uint64_t used = memory->used;
    int done = 0;
    for (int turn = 0; turn <= p->count; turn++) {
        share *from = &p->shares[(self + turn) % (p->count + 1)];
        for (;;) {
            uint64_t ticket = atomic_fetch_add(&from->tickets, 1);
            if ((ticket & INDEX_MASK) >= (ticket >> INDEX_BITS & INDEX_MASK)) break;
            int failed = p->body((int)(ticket & INDEX_MASK), &p->environment, p->data);
            memory->used = used;
            done++;
            if (failed) {
                pthread_mutex_lock(&p->lock);
                memcpy(p->message, message, sizeof message);
                pthread_mutex_unlock(&p->lock);
                atomic_store(&p->failed, 1);
            }
        }
    }
    atomic_fetch_add(&p->finished, done);
}

/* Kernels follow each other within microseconds: look this often before sleeping, or before letting others run. */
enum { LOOKS = 4000 };

typedef struct { pool *pool; int self; } worker_start;

static void *worker(void *given) {
    pool *p = ((worker_start *)given)->pool;
    int self = ((worker_start *)given)->self;
    share *own = &p->shares[self];
    memory = &p->stacks[self];
    free(given);
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < LOOKS && round_of(own) == seen; i++) pause_a_little();
        if (round_of(own) == seen) {
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->asleep, 1);
            while (round_of(own) == seen && !p->stopping) pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->asleep, 1);
            int stopping = p->stopping;
            pthread_mutex_unlock(&p->lock);
            if (stopping) return NULL;
        }
        seen = round_of(own);
        work(p, self);
    }
}

static int start_worker(pool *p) {
    worker_start *given = malloc(sizeof *given);
    if (given == NULL) return 0;
    given->pool = p, given->self = p->count + 1;
    if (pthread_create(&p->threads[p->count], NULL, worker, given) == 0) return 1;
    free(given);
    return 0;
}

/* Tasks per thread, so that a thread that is held up does not hold up the others. */
enum { SHARES = 4 };

int TVMBackendParallelLaunch(task body, void *data, int tasks) {
    pool *p = current;
    if (p == NULL || p->count == 0) {
        group environment = {NULL, 1};
        return body(0, &environment, data);
    }
    if (tasks <= 0) tasks = SHARES * (p->count + 1);
    p->body = body;
    p->data = data;
    p->environment.tasks = tasks;
    atomic_store(&p->finished, 0);
    atomic_store(&p->failed, 0);
    uint64_t round = (round_of(p->shares) + 1) & (UINT64_MAX >> 2 * INDEX_BITS), sharers = (uint64_t)p->count + 1;
    for (uint64_t i = 0; i < sharers; i++) {
        uint64_t next = i * (uint64_t)tasks / sharers, end = (i + 1) * (uint64_t)tasks / sharers;
        atomic_store(&p->shares[i].tickets, round << 2 * INDEX_BITS | end << INDEX_BITS | next);
    }
    if (atomic_load(&p->asleep)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
    work(p, 0);
    for (int i = 0; atomic_load(&p->finished) < tasks; i++)
        if (i < LOOKS) pause_a_little();
        else sched_yield();
    if (!atomic_load(&p->failed)) return 0;
    memcpy(message, p->message, sizeof message);
    return -1;
}

/* ---- memory of tasks, errors --------------------------------------------------------------------------------- */

static uint64_t whole_lines(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

void *TVMBackendAllocWorkspace(int type, int id, uint64_t bytes, int code, int bits) {
    (void)type, (void)id, (void)code, (void)bits;
    bytes = whole_lines(bytes);
    stack *s = memory;
    uint64_t start = s->used;
    s->used += bytes;
    if (s->used > s->wanted) s->wanted = s->used;
    if (start == 0 && s->size < s->wanted) {
        free(s->base);
        s->base = aligned_alloc(64, s->wanted);
        s->size = s->base == NULL ? 0 : s->wanted;
    }
    if (s->used <= s->size) return s->base + start;
    void *found = aligned_alloc(64, bytes ? bytes : 64); /* the first time only: then the stack is large enough */
    if (found == NULL) snprintf(message, sizeof message, "out of memory"), s->used = start;
    return found;
}

/* What was allocated later is free by then. */
int TVMBackendFreeWorkspace(int type, int id, void *pointer) {
    (void)type, (void)id;
    uint64_t place = (uint64_t)((unsigned char *)pointer - memory->base);
    if (memory->base == NULL || place >= memory->size) free(pointer);
    else if (place < memory->used) memory->used = place;
    return 0;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    size_t used = (size_t)snprintf(message, sizeof message, "%s: ", kind);
    for (int32_t i = 0; i < count && used < sizeof message; i++)
        used += (size_t)snprintf(message + used, sizeof message - used, "%s", parts[i]);
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text) {
    TVMFFIErrorSetRaisedFromCStrParts(kind, &text, 1);
}

/* Kernels call these through pointers that a runtime of TVM's would fill in. */
int (*__TVMBackendParallelLaunch)(task, void *, int) = TVMBackendParallelLaunch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = TVMBackendAllocWorkspace;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = TVMBackendFreeWorkspace;

/* ---- models ---------------------------------------------------------------------------------------------------- */

struct qcompile_model {
    const plan *plan;
    unsigned char *arena;
    tensor_view *views;
    pool threads;
};

static const plan *choose_plan(void) {
    for (int i = 0; i < (int)(sizeof plans / sizeof *plans); i++)
        if (supported(i)) return &plans[i];
    return NULL;
}

int qcompile_input_count(void) { return INPUTS; }
int qcompile_output_count(void) { return OUTPUTS; }
size_t qcompile_input_bytes(int index) { return input_bytes[index]; }
size_t qcompile_output_bytes(int index) { return output_bytes[index]; }

qcompile_model *qcompile_create(int threads) {
    snprintf(message, sizeof message, "out of memory");
    place_constants_once();
    qcompile_model *model = calloc(1, sizeof *model);
    if (model == NULL) return NULL;
    const plan *chosen = model->plan = choose_plan();
    if (chosen != NULL) {
        model->arena = aligned_alloc(64, (chosen->arena_bytes + 127) / 64 * 64);
        model->views = calloc(chosen->tensor_count, sizeof *model->views);
    }
    if (model->arena == NULL || model->views == NULL) {
        snprintf(message, sizeof message, "%s",
                 chosen ? "out of memory" : "compiled for " SERVED ", which this processor lacks");
        qcompile_destroy(model);
        return NULL;
    }
    memset(model->arena, 0, chosen->arena_bytes);
    for (uint32_t i = 0; i < chosen->tensor_count; i++) {
        const tensor_record *one = &chosen->tensors[i];
        tensor_view *view = &model->views[i];
        if (one->kind == ARENA) view->data = model->arena + one->position;
        if (one->kind == CONSTANT) view->data = (void *)(constants + one->position);
        view->device.type = CPU;
        view->dimensions = one->dimensions;
        view->dtype.code = one->code, view->dtype.bits = one->bits, view->dtype.lanes = 1;
        view->shape = (int64_t *)&chosen->extents[one->extents];
    }
    pthread_mutex_init(&model->threads.lock, NULL);
    pthread_cond_init(&model->threads.wake, NULL);
    int wanted = threads > 1 ? threads - 1 : 0;
    model->threads.threads = calloc((size_t)wanted + 1, sizeof(pthread_t));
    model->threads.stacks = calloc((size_t)wanted + 1, sizeof(stack));
    model->threads.shares = aligned_alloc(64, ((size_t)wanted + 1) * sizeof(share));
    if (model->threads.threads == NULL || model->threads.stacks == NULL || model->threads.shares == NULL) {
        qcompile_destroy(model);
        return NULL;
    }
    memset(model->threads.shares, 0, ((size_t)wanted + 1) * sizeof(share));
    while (model->threads.count < wanted && start_worker(&model->threads)) model->threads.count++;
    return model;
}

void qcompile_destroy(qcompile_model *model) {
    if (model == NULL) return;
    pool *p = &model->threads;
    if (p->count) {
        pthread_mutex_lock(&p->lock);
        p->stopping = 1;
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
        for (int i = 0; i < p->count; i++) pthread_join(p->threads[i], NULL);
    }
    for (int i = 0; p->stacks != NULL && i <= p->count; i++) free(p->stacks[i].base);
    free(p->stacks);
    free(p->shares);
    free(p->threads);
    free(model->views);
    free(model->arena);
    free(model);
}

const char *qcompile_processor(const qcompile_model *model) { return model->plan->name; }

static int64_t nanoseconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int qcompile_kernel_count(const qcompile_model *model) { return (int)model->plan->call_count; }

int qcompile_run(qcompile_model *model, const void *const *inputs, void *const *outputs) {
    return qcompile_run_timed(model, inputs, outputs, NULL);
}

int qcompile_run_timed(qcompile_model *model, const void *const *inputs, void *const *outputs, int64_t *times) {
    const plan *chosen = model->plan;
    *message = 0;
    for (uint32_t i = 0; i < chosen->tensor_count; i++) {
        const tensor_record *one = &chosen->tensors[i];
        if (one->kind == INPUT) model->views[i].data = (void *)inputs[one->position];
        if (one->kind == OUTPUT) model->views[i].data = outputs[one->position];
    }
    current = &model->threads;
    memory = model->threads.stacks;
    int failed = 0;
    for (uint32_t i = 0; i < chosen->call_count && !failed; i++) {
        const call_record *call = &chosen->calls[i];
        argument given[MOST_ARGUMENTS], result = {0, 0, NULL};
        int64_t started = times == NULL ? 0 : nanoseconds_now();
        for (uint32_t j = 0; j < call->count; j++) {
            given[j].type = TENSOR, given[j].padding = 0;
            given[j].pointer = &model->views[chosen->arguments[call->first + j]];
        }
        failed = call->run(NULL, given, (int32_t)call->count, &result);
        memory->used = 0;
        if (times != NULL) times[i] = nanoseconds_now() - started;
    }
    current = NULL, memory = NULL;
    for (uint32_t i = 0; i < chosen->copy_count && !failed; i++) {
        const copy_record *one = &chosen->copies[i];
        memcpy(outputs[one->output], model->views[one->tensor].data, output_bytes[one->output]);
    }
    return failed;
}
