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

constexpr int64_t AHEAD = 2048;  // bytes of codes that are asked for early: rows lie one after the other
// Columns [f0, f1) of y [M, O] = x W for codes; x [M, K] float32, zeros past I. `round`: x holds bfloat16 numbers, and
// tables of packed codes may be rounded to them.
void quantized_few(const Matrix& w, int64_t M, bool round, const float* x, float* y, int64_t f0, int64_t f1);

// Attention of tiles, each R rows for every key head, to a cache.
struct Cache {
  int64_t K, H, R, group, page_size, max_pages, page, head, token;  // the last three: strides in elements
  const int32_t *table, *sequence, *position, *end;
  bool causal = true;
  int64_t window = 0;
  float scale, softcap = 0;
  const int32_t* start = nullptr;  // where a tile's keys begin in its row of `table`; null: at 0
  const float *key_scales = nullptr, *value_scales = nullptr, *slopes = nullptr;
  bool round = false;  // queries, keys, values and weights may be rounded to bfloat16

  int64_t first_key(int64_t m) const {
    return window > 0 ? std::max<int64_t>(0, position[m] - window + 1) / 16 * 16 : 0;
  }
  // Where n <= 16 keys from `s` on lie, and their scales' places.
  void places(int64_t m, int64_t k, int64_t s, int64_t n, int64_t* at, int64_t* scale_at) const {
    const int32_t* pages = table + sequence[m] * max_pages;
    s += start ? start[m] : 0;
    int64_t index = s / page_size, slot = s - index * page_size;
    for (int64_t i = 0; i < n; i++, slot++) {
      if (slot == page_size) slot = 0, index++;
      at[i] = pages[index] * page + k * head + slot * token;
      scale_at[i] = (pages[index] * K + k) * page_size + slot;
    }
  }
};
constexpr int64_t CHUNK = 256;  // keys of a part
// Sums [R, H], largest scores [R] and sums of exponentials [R], one after the other, over the keys [s0, s1), at most a
// chunk, of tile m's key head k; q [R, H].
template <typename T>
void attend_part(const Cache& c, const float* q, const T* keys, const T* values, int64_t m, int64_t k, int64_t s0,
                 int64_t s1, float* part);

// o [H]: row r of n such parts together; returns the logarithm of its sum of exponentials, -inf where nothing is seen.
template <typename P>
float combine(const P& part, int64_t n, int64_t r, int64_t R, int64_t H, float* o) {
  float top = -INFINITY, total = 0;
  for (int64_t i = 0; i < n; i++) top = std::max(top, part(i)[R * H + r]);
  memset(o, 0, H * sizeof(float));
  if (top == -INFINITY) return top;
  for (int64_t i = 0; i < n; i++) total += std::exp(part(i)[R * H + r] - top) * part(i)[R * H + R + r];
  for (int64_t i = 0; i < n; i++) {
    const __m512 weight = _mm512_set1_ps(std::exp(part(i)[R * H + r] - top) / total);
    for (int64_t h = 0; h < H; h += 16)
      _mm512_storeu_ps(o + h, _mm512_fmadd_ps(weight, _mm512_loadu_ps(part(i) + r * H + h), _mm512_loadu_ps(o + h)));
  }
  return top + std::log(total);
}
