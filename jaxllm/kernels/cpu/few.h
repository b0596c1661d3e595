// What the step of all layers (layers.cc) takes from the other kernels, for one thread's part.
#pragma once
#include "common.h"

// A weight W [I, O] as it is stored: dense [I, O], or codes [O, K] of `jaxllm/kernels/quantized/weights.py`.
enum Kind : int64_t { FLOAT32, BFLOAT16, BYTES, NIBBLES };
struct Matrix {
  Kind kind;
  const uint8_t* values;
  const float *scales, *zeros, *table;  // of codes: zeros may be null; table: the 16 values of packed ones
  int64_t I, O, K, group;               // K: inputs as stored, padded; group: inputs that share a scale

  int64_t groups() const { return (K + group - 1) / group; }
};

// Columns [f0, f1) of y [M, O] = x W for codes; x [M, K] float32, zeros past I. `round`: x holds bfloat16 numbers, and
// tables of packed codes may be rounded to them.
void quantized_few(const Matrix& w, int64_t M, bool round, const float* x, float* y, int64_t f0, int64_t f1);

// Causal attention of R query heads of one key head, to keys in pages [*, K, page_size, H].
struct Paged {
  int64_t K, H, R, page_size, max_pages;
  const int32_t *table, *sequence, *position;  // of token m: its row of the table, and its place in it
  const void *keys, *values;
  bool is_bf16;
  float scale;
};
constexpr int64_t DECODE_CHUNK = 256;  // keys of a part
// Sums [R, H], largest scores [R] and sums of exponentials [R] over the keys [s0, s1), at most a chunk, of token m.
void decode_part(const Paged& p, const float* q, int64_t m, int64_t k, int64_t s0, int64_t s1, float* acc, float* top,
                 float* total);
