// The functions that Python calls, through ctypes. `castlm_describe` gives it their signatures, the structs and all codes, so that
// nothing is written down twice.
//
// Python owns every buffer. A model keeps the addresses of its weights, norms, biases and tables; no other function keeps what it
// gets. Functions that return `int` return an `Error`, unless it says otherwise. None throws.

#pragma once

#include <cstdint>

#include "engine.h"
#include "sampler.h"

extern "C" {

const char* castlm_describe();  // JSON; see describe.cpp

int castlm_level();         // the level in use, by its place among "levels" of the description
int castlm_runs(int level);  // 1 where this processor has a level
int castlm_set_level(int level);  // for weights that are repacked from now on; 1 where the processor lacks it

// ---- weights (kernels.cpp)

// Bytes of the buffer that `castlm_repack` fills; -1 where there is no such weight. Layout -1 takes the best one.
int64_t castlm_packed_bytes(int layout, int values, int n, int m, int64_t rows, int64_t columns);
// Builds the buffer `to` from the tensors of a file: values (rows, kept), mask (rows, columns / 8), fp32 scales.
int castlm_repack(int layout, int values, int n, int m, int64_t rows, int64_t columns, const uint8_t* from, int64_t from_bytes,
                  const uint8_t* mask, int64_t mask_bytes, const float* scales, int64_t num_scales, uint8_t* to, int64_t to_bytes,
                  int threads);
// The rows of x that a caller with many should give at a time; 0 where a GEMM of fp32 on the unpacked weight is faster.
int castlm_rows_at_once(const uint8_t* packed, int64_t bytes);
// y (batch, rows) = x (batch, columns) times the transposed matrix; both are fp32, or both bf16.
int castlm_multiply(const uint8_t* packed, int64_t bytes, const uint8_t* x, int is_bfloat16, int64_t batch, int64_t columns, uint8_t* y,
                    int64_t rows, int threads);
// The rows `numbers` of the matrix as fp32, (count, columns).
int castlm_gather(const uint8_t* packed, int64_t bytes, const int64_t* numbers, int64_t count, float* to, int64_t columns, int threads);
// Rows [first, last) of the matrix as fp32, (last - first, columns).
int castlm_unpack(const uint8_t* packed, int64_t bytes, int64_t first, int64_t last, float* to, int64_t count, int threads);

// ---- models (engine.cpp)

int castlm_model_new(const castlm::ModelSpec* spec, void** model);
void castlm_model_free(void* model);
int64_t castlm_model_barriers(void* model);               // of its last pass: steps in which threads waited for each other
int64_t castlm_cache_block_bytes(void* model, int kind);  // of all layers; -1: no such kind
int castlm_cache_new(void* model, int kind, int64_t num_blocks, void** cache);  // reserves addresses; memory comes as blocks are written
void castlm_cache_free(void* cache);                                            // before its model
void castlm_cache_release(void* cache, const int32_t* blocks, int64_t count);   // gives the memory of blocks back to the system
// Runs the new tokens of `count` sequences. Passes of one model run one after another. A block must be written from its first position
// on; sequences may share blocks that are before their `position`.
int castlm_forward(void* model, void* cache, const castlm::Sequence* sequences, int64_t count, int threads);

// ---- the next tokens (sampler.cpp)

// Chooses a token for each row of `logits` (count, vocabulary), as its `specs` says. In place of a token, a row has -1 where a logit
// is NaN or +inf, or all are -inf, and -2 where the spec allows none that is not -inf. `logprobs` (count, 1 + most_best) takes the log
// probabilities of the chosen token and of the most probable ones, `best` (count, most_best) these tokens, of rows whose `num_best` is
// not negative; the places that a row does not need stay as they are. `spec_bytes` is the size of a spec.
int castlm_sample(const float* logits, int64_t count, int64_t vocabulary, const castlm::SampleSpec* specs, int64_t spec_bytes,
                  int64_t most_best, int32_t* tokens, float* logprobs, int32_t* best, int threads);
}
