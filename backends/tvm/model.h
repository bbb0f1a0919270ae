/* A compiled model. A model runs in one thread at a time; make one per thread that calls it. */

#ifndef QCOMPILE_MODEL_H
#define QCOMPILE_MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QCOMPILE_API __attribute__((visibility("default")))

typedef struct qcompile_model qcompile_model;

/* A model that uses so many threads; NULL on failure, see qcompile_error. */
QCOMPILE_API qcompile_model *qcompile_create(int threads);

/* Run it. One pointer per input and output, to tensors of the shapes that README.md lists, contiguous, aligned to
   64 bytes. Returns 0, or another number on failure. */
QCOMPILE_API int qcompile_run(qcompile_model *model, const void *const *inputs, void *const *outputs);

/* The same; `times` gets the nanoseconds of every kernel, qcompile_kernel_count of them. */
QCOMPILE_API int qcompile_run_timed(qcompile_model *model, const void *const *inputs, void *const *outputs,
                                    int64_t *times);
QCOMPILE_API int qcompile_kernel_count(const qcompile_model *model);

QCOMPILE_API void qcompile_destroy(qcompile_model *model);

/* Which of the kinds of processors that the model was compiled for this one is. */
QCOMPILE_API const char *qcompile_processor(const qcompile_model *model);

/* Tensors that the model takes and gives, and the bytes of each. */
QCOMPILE_API int qcompile_input_count(void);
QCOMPILE_API int qcompile_output_count(void);
QCOMPILE_API size_t qcompile_input_bytes(int index);
QCOMPILE_API size_t qcompile_output_bytes(int index);

/* What went wrong last in this thread. */
QCOMPILE_API const char *qcompile_error(void);

/* The block of constants: weights, and the numbers of epilogues. */
QCOMPILE_API const void *qcompile_data(void);
QCOMPILE_API size_t qcompile_data_bytes(void);

#ifdef __cplusplus
}
#endif

#endif
