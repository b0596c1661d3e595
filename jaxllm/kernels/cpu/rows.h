// RMSNorm and RoPE of one row, for elementwise.cc and for the step of all layers (layers.cc). y may be x.
#pragma once
#include "common.h"

// y = x / rms(x) * w; returns 1 / rms(x).
template <typename T>
static inline float rms_norm_row(const T* x, const float* w, float eps, int64_t D, T* y) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < D; c += 16) {
    const __m512 v = load16(x + c, first(D - c));
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const float scale = 1.f / std::sqrt(_mm512_reduce_add_ps(sum) / D + eps);
  for (int64_t c = 0; c < D; c += 16) {
    const __mmask16 m = first(D - c);
    store16(y + c, _mm512_mul_ps(_mm512_mul_ps(load16(x + c, m), _mm512_set1_ps(scale)), load16(w + c, m)), m);
  }
  return scale;
}

// The halves (a, b) of H numbers rotated: (a cos - b sin, b cos + a sin); sign -1: back (the gradient).
template <typename T>
static inline void rope_row(const T* x, const float* cos, const float* sin, int64_t H, float sign, T* y) {
  const int64_t h = H / 2;
  for (int64_t c = 0; c < h; c += 16) {
    const __mmask16 m = first(h - c);
    const __m512 a = load16(x + c, m), b = load16(x + h + c, m), co = load16(cos + c, m);
    const __m512 si = _mm512_mul_ps(load16(sin + c, m), _mm512_set1_ps(sign));
    store16(y + c, _mm512_fnmadd_ps(b, si, _mm512_mul_ps(a, co)), m);
    store16(y + h + c, _mm512_fmadd_ps(a, si, _mm512_mul_ps(b, co)), m);
  }
}
