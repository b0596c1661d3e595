// Products of which each row is computed as if it were alone: the batch-invariant mode.
//
// The product of many rows (`gemm`) sums a row's products in one order, whatever rows stand beside it: float32 along K
// in chunks of `f32_chunk`, bfloat16 as the tile unit does. But it packs the weights first, which takes longer than
// multiplying a few rows. Here a few rows are multiplied in the very same order without that.
#include "gemm.h"

constexpr int64_t LOW_ROWS = 48;  // from more rows on packing all of the weights costs less than it gains

// sum [M, N] = x[:, k0:k1] w[k0:k1] for the columns [c0, c1), eight rows of w at once.
static void plain_rows(const float* x, int64_t M, int64_t ldx, const float* w, int64_t N, float* sum, int64_t ld,
                       int64_t k0, int64_t k1, int64_t c0, int64_t c1) {
  for (int64_t k = k0; k < k1; k += 8) {
    const int64_t rows = std::min<int64_t>(8, k1 - k);
    for (int64_t c = c0; c < c1; c += 16) {
      const __mmask16 mask = first(N - c);
      __m512 v[8];
#pragma GCC unroll 8
      for (int64_t r = 0; r < 8; r++) v[r] = r < rows ? load16(w + (k + r) * N + c, mask) : _mm512_setzero_ps();
      for (int64_t m = 0; m < M; m++) {
        __m512 a = k == k0 ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + m * ld + c);
        const float* xm = x + m * ldx + k;
        if (rows == 8) {
#pragma GCC unroll 8
          for (int r = 0; r < 8; r++) a = _mm512_fmadd_ps(_mm512_set1_ps(xm[r]), v[r], a);
        } else {
          for (int64_t r = 0; r < rows; r++) a = _mm512_fmadd_ps(_mm512_set1_ps(xm[r]), v[r], a);
        }
        _mm512_storeu_ps(sum + m * ld + c, a);
      }
    }
  }
}

// sum [R, 32] += x[:, k : k + n] t [n, 32].
template <int R>
static void turned_step(const float* x, int64_t ldx, int64_t n, const float* t, float* sum) {
  __m512 a[R], b[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) a[r] = _mm512_loadu_ps(sum + r * NR), b[r] = _mm512_loadu_ps(sum + r * NR + 16);
  for (int64_t i = 0; i < n; i++) {
    const __m512 t0 = _mm512_load_ps(t + i * NR), t1 = _mm512_load_ps(t + i * NR + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512 v = _mm512_set1_ps(x[r * ldx + i]);
      a[r] = _mm512_fmadd_ps(v, t0, a[r]);
      b[r] = _mm512_fmadd_ps(v, t1, b[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) _mm512_storeu_ps(sum + r * NR, a[r]), _mm512_storeu_ps(sum + r * NR + 16, b[r]);
}

// y [M, n0 : n0 + 32] = x w^T, w [N, K].
static void turned_columns(const float* x, int64_t M, int64_t ldx, const float* w, float* y, int64_t N, int64_t K,
                           int64_t n0) {
  alignas(64) float t[16 * NR], sum[LOW_ROWS * NR];
  const int64_t chunk = f32_chunk(K), n = std::min<int64_t>(NR, N - n0);
  for (int64_t k0 = 0; k0 < K; k0 += chunk) {
    memset(sum, 0, M * NR * sizeof(float));
    const int64_t k1 = std::min(K, k0 + chunk);
    for (int64_t k = k0; k < k1; k += 16) {
      const int64_t here = std::min<int64_t>(16, k1 - k);
      f32_pack_panel(t, w + k, K, true, here, N, n0);
      int64_t m = 0;
      for (; m + 8 <= M; m += 8) turned_step<8>(x + m * ldx + k, ldx, here, t, sum + m * NR);
      const float* xm = x + m * ldx + k;
      switch (M - m) {
#define ROWS(R) \
  case R: turned_step<R>(xm, ldx, here, t, sum + m * NR); break;
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7)
#undef ROWS
      }
    }
    for (int64_t m = 0; m < M; m++)
      for (int64_t c = 0; c < n; c += 16) {
        const __mmask16 mask = first(n - c);
        float* at = y + m * N + n0 + c;
        __m512 v = _mm512_load_ps(sum + m * NR + c);
        if (k0 > 0) v = _mm512_add_ps(v, load16(at, mask));
        store16(at, v, mask);
      }
  }
}

static void low_f32(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, const float* x, const float* w, bool turned,
                    float* y) {
  static thread_local Scratch sums_;
  if (turned) {
    parallel_for(pool, (int)((N + NR - 1) / NR), [&](int i) { turned_columns(x, M, K, w, y, N, K, i * NR); });
    return;
  }
  const int64_t chunk = f32_chunk(K), chunks = (K + chunk - 1) / chunk, ld = (N + 15) / 16 * 16;
  const int64_t blocks = std::min<int64_t>((N + 127) / 128, (8 + chunks - 1) / chunks);
  const int64_t width = ((N + blocks - 1) / blocks + 15) / 16 * 16;
  float* sums = sums_.get<float>(chunks * M * ld);
  parallel_for(pool, (int)(chunks * blocks), [&](int i) {
    const int64_t ch = i / blocks, c0 = i % blocks * width, k0 = ch * chunk;
    plain_rows(x, M, K, w, N, sums + ch * M * ld, ld, k0, std::min(K, k0 + chunk), c0, std::min(N, c0 + width));
  });
  add_parts(sums, chunks, M, N, ld, y);
}

// Some panels at a time are packed and multiplied while they are in the second-level cache.
template <typename SA, typename SB, typename TC>
static void low_bf16(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, const SA* x, const SB* w, bool turned,
                     TC* y) {
  const int64_t ld = turned ? K : N, stride = BF16::panel(K), together = std::max<int64_t>(1, std::min<int64_t>(8, (1 << 19) / (stride * 2)));
  const int64_t panels = (N + NR - 1) / NR;
  parallel_for(pool, (int)((panels + together - 1) / together), [&](int i) {
    static thread_local Scratch packed_;
    AmxScope amx;
    const int64_t p0 = i * together, p1 = std::min(panels, p0 + together);
    bf16* packed = packed_.get<bf16>(together * stride);
    for (int64_t p = p0; p < p1; p++) bf16_pack_panel(packed + (p - p0) * stride, w, ld, turned, K, N, p * NR);
    BF16::block(M, std::min(N, p1 * NR) - p0 * NR, K, x, K, false, packed, stride, y + p0 * NR, N, false);
  });
}

static ffi::Error MatmulInOrder(ffi::ThreadPool pool, Any a, Any b, AnyOut c, bool tb) {
  const Mat A = mat(a, false), B = mat(b, tb);
  const int64_t M = a.dimensions()[0], K = a.dimensions()[1], N = b.dimensions()[tb ? 0 : 1];
  if (K != b.dimensions()[tb ? 1 : 0]) return ffi::Error::InvalidArgument("matmul: inner dimensions differ");
  if (M > LOW_ROWS) {
    gemm(pool, A.is_bf16 || B.is_bf16, M, N, K, A, B, c->untyped_data(), N, mat(*c, false).is_bf16, false);
  } else if (!A.is_bf16 && !B.is_bf16) {
    low_f32(pool, M, N, K, (const float*)A.p, (const float*)B.p, tb, (float*)c->untyped_data());
  } else {
    typed(a, [&](auto* x) {
      typed(b, [&](auto* w) { typed(*c, [&](auto* y) { low_bf16(pool, M, N, K, x, w, tb, y); }); });
    });
  }
  return ffi::Error::Success();
}
HANDLER(cpu_matmul_in_order, MatmulInOrder, "tb");

// What the compiler cannot fuse with what comes after.
static ffi::Error Copy(Any x, AnyOut y) {
  memcpy(y->untyped_data(), x.untyped_data(), x.size_bytes());
  return ffi::Error::Success();
}
HANDLER(cpu_copy, Copy);
