// Scores and sums of values for 16 rows and more by the tile unit: operands rounded to bfloat16, sums in float32.
#pragma once
#include "gemm.h"

static inline bool tiles_pay(int64_t R, int64_t H) { return amx_ok && R >= 16 && H % 32 == 0; }

// Rows [R, n] in bfloat16, `to` elements apart; up to a multiple of 16 rows and 32 columns there are zeros.
static void round_rows(const float* x, int64_t from, int64_t R, int64_t n, bf16* out, int64_t to) {
  for (int64_t r = 0; r < (R + 15) / 16 * 16; r++)
    for (int64_t i = 0; i < n; i += 32)
      _mm512_storeu_si512(out + r * to + i, r < R ? row32(x + r * from + i, first32(n - i)) : _mm512_setzero_si512());
}

// out[r, 0..15] = q[r] key, for n <= 16 keys (zeros past them). `turned` holds 16 H elements.
template <typename T>
void tile_scores(const bf16* q, int64_t R, const T* keys, const int64_t* at, int64_t n, int64_t H, bf16* turned,
                 float* out, int64_t ld) {
#ifdef HAVE_AMX
  for (int64_t h = 0; h < H; h += 32) {
    __m512i t[16];
    for (int64_t i = 0; i < 16; i++) t[i] = i < n ? row32(keys + at[i] + h, 0xffffffffu) : _mm512_setzero_si512();
    transpose16(t);
    for (int64_t i = 0; i < 16; i++) _mm512_store_si512(turned + h * 16 + i * 32, t[i]);
  }
  asm volatile("" ::: "memory");  // gcc does not know that tile loads read memory
  for (int64_t r = 0; r < R; r += 16) {
    _tile_zero(0);
    for (int64_t h = 0; h < H; h += 32) {
      _tile_loadd(4, q + r * H + h, H * 2);
      _tile_loadd(6, turned + h * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, out + r * ld, ld * 4);
  }
#endif
}

// acc[r] = sum over n keys of p[r, key] value, p [R, n] with zeros up to a multiple of 32. `pairs` holds 32 n elements.
template <typename T>
void tile_values(const bf16* p, int64_t ld, int64_t R, const T* v, const int64_t* at, int64_t n, int64_t H, bf16* pairs,
                 float* acc) {
#ifdef HAVE_AMX
  const int64_t padded = (n + 31) / 32 * 32;
  for (int64_t h = 0; h < H; h += 32) {
    const auto row = [&](int64_t s) { return s < n ? row32(v + at[s] + h, 0xffffffffu) : _mm512_setzero_si512(); };
    for (int64_t s = 0; s < padded; s += 2) {
      bf16* to = pairs + s / 32 * 1024 + s % 32 * 16;
      __m512i out[2];
      pairs32(row(s), row(s + 1), out);
      _mm512_store_si512(to, out[0]);
      _mm512_store_si512(to + 512, out[1]);
    }
    asm volatile("" ::: "memory");
    for (int64_t r = 0; r < R; r += 16) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t s = 0; s < padded; s += 32) {
        _tile_loadd(4, p + r * ld + s, ld * 2);
        _tile_loadd(6, pairs + s * 32, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, pairs + s * 32 + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, acc + r * H + h, H * 4);
      _tile_stored(1, acc + r * H + h + 16, H * 4);
    }
  }
#endif
}
