/* Runs the model on files: raw tensors in, raw tensors out.

       runner [-t threads] [-r repeats] [-c file] input ... output ...

   -r  run so often and print the best and the median time of a run
   -c  write the block of constants to a file, and nothing else */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "model.h"

static void *memory(size_t bytes) {
    void *found = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (found == NULL) fprintf(stderr, "out of memory\n"), exit(1);
    return found;
}

static void transfer(const char *name, const char *mode, void *data, size_t bytes) {
    FILE *file = fopen(name, mode);
    size_t done = file == NULL ? 0 : *mode == 'r' ? fread(data, 1, bytes, file) : fwrite(data, 1, bytes, file);
    int more = file != NULL && *mode == 'r' && fgetc(file) != EOF;
    if (file == NULL || done != bytes || fclose(file) || more) {
        fprintf(stderr, "%s: cannot %s exactly %zu bytes\n", name, *mode == 'r' ? "read" : "write", bytes);
        exit(2);
    }
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **given) {
    int threads = 1, repeats = 0, option;
    const char *constants = NULL;
    while ((option = getopt(count, given, "t:r:c:")) != -1) {
        if (option == 't') threads = atoi(optarg);
        else if (option == 'r') repeats = atoi(optarg);
        else if (option == 'c') constants = optarg;
        else return 2;
    }
    if (constants != NULL) {
        transfer(constants, "wb", (void *)qcompile_data(), qcompile_data_bytes());
        return 0;
    }
    int inputs = qcompile_input_count(), outputs = qcompile_output_count();
    if (count - optind != inputs + outputs) {
        fprintf(stderr, "usage: %s [-t threads] [-r repeats] %d input files, %d output files\n", given[0], inputs,
                outputs);
        return 2;
    }
    const void **in = calloc((size_t)inputs + 1, sizeof *in);
    void **out = calloc((size_t)outputs + 1, sizeof *out);
    if (in == NULL || out == NULL) return 1;
    for (int i = 0; i < inputs; i++) {
        void *data = memory(qcompile_input_bytes(i));
        transfer(given[optind + i], "rb", data, qcompile_input_bytes(i));
        in[i] = data;
    }
    for (int i = 0; i < outputs; i++) out[i] = memory(qcompile_output_bytes(i));
    qcompile_model *model = qcompile_create(threads);
    if (model == NULL || qcompile_run(model, in, out)) {
        fprintf(stderr, "%s\n", qcompile_error());
        return 1;
    }
    for (int i = 0; i < outputs; i++)
        transfer(given[optind + inputs + i], "wb", out[i], qcompile_output_bytes(i));
    double *times = repeats > 0 ? calloc((size_t)repeats, sizeof *times) : NULL;
    for (int i = 0; times != NULL && i < repeats; i++) {
        struct timespec start, end;
        clock_gettime(CLOCK_MONOTONIC, &start);
        if (qcompile_run(model, in, out)) return 1;
        clock_gettime(CLOCK_MONOTONIC, &end);
        times[i] = (double)(end.tv_sec - start.tv_sec) * 1e3 + (double)(end.tv_nsec - start.tv_nsec) * 1e-6;
    }
    if (times != NULL) {
        qsort(times, (size_t)repeats, sizeof *times, by_value);
        printf("%s: best %.4f ms, median %.4f ms\n", qcompile_processor(model), times[0], times[repeats / 2]);
    }
    qcompile_destroy(model);
    return 0;
}
