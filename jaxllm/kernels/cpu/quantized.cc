// Products with int8, int4 and nf4 weights as an XLA custom call: y = x W, float32. Layout: kernels/quantized/weights.py.
//
// A few tokens (decoding): each weight row is unpacked into registers once and multiplied with every token, scales once
// a group, so the time is that of reading the codes. More tokens: 32 rows at a time become a packed panel in the first-level cache, which
// the dense product's inner kernel multiplies.
#include "few.h"
#include "gemm.h"

struct Codes {
  const uint8_t* values;
  const float *scales, *zeros;  // [groups, F]; zeros may be null
  __m512 table;                 // of packed codes
  int64_t F, K, shift;          // K: padded inputs; k >> shift: the group of input k
  bool packed;

  // 16 weights of row f from input k on, given the vector of bytes they are in.
  __m512 real(__m512i code, int64_t f, int64_t k) const {
    __m512 v = packed ? _mm512_permutexvar_ps(code, table) : _mm512_cvtepi32_ps(code);
    int64_t at = (k >> shift) * F + f;
    if (zeros) v = _mm512_sub_ps(v, _mm512_set1_ps(zeros[at]));
    return _mm512_mul_ps(v, _mm512_set1_ps(scales[at]));
  }

  // use(k, weights k .. k + 15) for all k of [k0, k1), in steps of a block of 256 (packed) or of 16.
  template <typename U>
  void row(int64_t f, int64_t k0, int64_t k1, const U& use) const {
    if (!packed) {
      const uint8_t* p = values + f * K;
      for (int64_t k = k0; k < k1; k += 16)
        use(k, real(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + k))), f, k));
      return;
    }
    const uint8_t* p = values + f * K / 2;
    for (int64_t block = k0; block < k1; block += 256)
      for (int64_t j = 0; j < 128; j += 16) {
        __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + block / 2 + j)));
        use(block + j, real(_mm512_and_si512(both, _mm512_set1_epi32(15)), f, block + j));
        use(block + 128 + j, real(_mm512_srli_epi32(both, 4), f, block + 128 + j));
      }
  }
};

template <int N>
static __m512 sum_of(const __m512* x) {
  if constexpr (N == 1) return x[0];
  else return _mm512_add_ps(sum_of<N / 2>(x), sum_of<N / 2>(x + N / 2));
}

// Sums of a span of weights that share a scale, times the activations of M tokens; then the scale, once.
template <int M, bool Zeros>
static void few_packed(const Codes& w, const float* x, float* y, int64_t f0, int64_t f1) {
  constexpr int U = M <= 2 ? 4 : 1;
  const int64_t span = std::min<int64_t>(128, w.shift < 7 ? 1 << w.shift : 128);
  const __m512i low = _mm512_set1_epi32(15);
  for (int64_t f = f0; f < f1; f++) {
    const uint8_t* p = w.values + f * w.K / 2;
    __m512 total[M];
    for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
    for (int64_t block = 0; block < w.K; block += 256)
      for (int64_t sub = 0; sub < 128; sub += span) {
        const int64_t a = (block + sub >> w.shift) * w.F + f, b = (block + 128 + sub >> w.shift) * w.F + f;
        const __m512 za = _mm512_set1_ps(Zeros ? w.zeros[a] : 0), zb = _mm512_set1_ps(Zeros ? w.zeros[b] : 0);
        __m512 first[M][U], second[M][U];
        for (int m = 0; m < M; m++)
          for (int i = 0; i < U; i++) first[m][i] = second[m][i] = _mm512_setzero_ps();
        const auto add = [&](int64_t j, int i) {
          if (j % 64 == 0) _mm_prefetch((const char*)(p + block / 2 + j + AHEAD), _MM_HINT_T0);
          const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + block / 2 + j)));
          __m512 u = _mm512_permutexvar_ps(_mm512_and_si512(both, low), w.table);
          __m512 v = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), w.table);
          if (Zeros) u = _mm512_sub_ps(u, za), v = _mm512_sub_ps(v, zb);
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            first[m][i] = _mm512_fmadd_ps(u, load16(x + m * w.K + block + j), first[m][i]);
            second[m][i] = _mm512_fmadd_ps(v, load16(x + m * w.K + block + 128 + j), second[m][i]);
          }
        };
        int64_t j = sub;
        for (; j + 16 * U <= sub + span; j += 16 * U) {
#pragma GCC unroll 4
          for (int i = 0; i < U; i++) add(j + 16 * i, i);
        }
        for (; j < sub + span; j += 16) add(j, 0);
        const __m512 sa = _mm512_set1_ps(w.scales[a]), sb = _mm512_set1_ps(w.scales[b]);
        for (int m = 0; m < M; m++)
          total[m] = _mm512_fmadd_ps(sa, sum_of<U>(first[m]), _mm512_fmadd_ps(sb, sum_of<U>(second[m]), total[m]));
      }
    for (int m = 0; m < M; m++) y[m * w.F + f] = _mm512_reduce_add_ps(total[m]);
  }
}

// The same of codes that are numbers, several vectors at once; those have no zero points.
template <int M>
static void few_bytes(const Codes& w, const float* x, float* y, int64_t f0, int64_t f1) {
  constexpr int U = M <= 2 ? 4 : M <= 4 ? 2 : 1;
  const int64_t span = w.shift < 62 ? (int64_t)1 << w.shift : w.K;
  for (int64_t f = f0; f < f1; f++) {
    const uint8_t* p = w.values + f * w.K;
    __m512 total[M];
    for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
    for (int64_t k0 = 0; k0 < w.K; k0 += span) {
      const int64_t k1 = std::min(w.K, k0 + span);
      __m512 sum[M][U];
      for (int m = 0; m < M; m++)
        for (int u = 0; u < U; u++) sum[m][u] = _mm512_setzero_ps();
      const auto add = [&](int64_t k, int u) {
        if (k % 64 == 0) _mm_prefetch((const char*)(p + k + AHEAD), _MM_HINT_T0);
        const __m512 v = load16((const int8_t*)p + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) sum[m][u] = _mm512_fmadd_ps(v, load16(x + m * w.K + k), sum[m][u]);
      };
      int64_t k = k0;
      for (; k + 16 * U <= k1; k += 16 * U) {
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) add(k + 16 * u, u);
      }
      for (; k < k1; k += 16) add(k, 0);
      const __m512 scale = _mm512_set1_ps(w.scales[(k0 >> w.shift) * w.F + f]);
      for (int m = 0; m < M; m++) total[m] = _mm512_fmadd_ps(scale, sum_of<U>(sum[m]), total[m]);
    }
    for (int m = 0; m < M; m++) y[m * w.F + f] = _mm512_reduce_add_ps(total[m]);
  }
}

template <int M>
static void few(const Codes& w, const float* x, float* y, int64_t f0, int64_t f1) {
  if (!w.packed) few_bytes<M>(w, x, y, f0, f1);
  else if (w.zeros) few_packed<M, true>(w, x, y, f0, f1);
  else few_packed<M, false>(w, x, y, f0, f1);
}

using Few = void (*)(const Codes&, const float*, float*, int64_t, int64_t);
static constexpr Few FEW[] = {few<1>, few<2>, few<3>, few<4>, few<5>, few<6>, few<7>, few<8>};

static void many(const Codes& w, const float* x, int64_t M, float* y, int64_t f0) {
  static thread_local Scratch rows, panel;
  const int64_t KC = 256, N = std::min<int64_t>(NR, w.F - f0);
  float *r = rows.get<float>(NR * KC), *p = panel.get<float>(NR * KC);
  for (int64_t k0 = 0; k0 < w.K; k0 += KC) {
    const int64_t kc = std::min(KC, w.K - k0);
    for (int64_t n = 0; n < N; n++)
      w.row(f0 + n, k0, k0 + kc, [&](int64_t k, __m512 v) { _mm512_storeu_ps(r + n * kc + k - k0, v); });
    f32_pack_panel(p, r, kc, true, kc, N, 0);
    F32::block(M, N, kc, x + k0, w.K, false, p, NR * kc, y + f0, w.F, k0 > 0);
  }
}

// InOrder: as many rows are, also a few: each row's result is then that of the row alone.
template <bool InOrder>
static ffi::Error QuantizedImpl(ffi::ThreadPool pool, Floats x, Any values, Floats scales, Floats zeros, Floats table,
                                FloatsOut y, bool packed, int64_t group) {
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1], F = values.dimensions()[0];
  if (values.dimensions()[1] * (packed ? 2 : 1) != K || K % (packed ? 256 : 128) ||
      (group < K && (group < 16 || (group & (group - 1)))))
    return ffi::Error::InvalidArgument("quantized_matmul: shapes disagree");
  const int64_t shift = group < K ? __builtin_ctzll(group) : 62;
  Codes w{(const uint8_t*)values.untyped_data(), scales.typed_data(), given(zeros),
          _mm512_loadu_ps(table.typed_data()), F, K, shift, packed};
  const float* in = x.typed_data();
  float* out = y->typed_data();
  if (!InOrder && M >= 1 && M <= 16) {  // eight at a time, while these weights are in the cache
    parallel_for(pool, (int)((F + 63) / 64), [&](int i) {
      for (int64_t m = 0; m < M; m += 8)
        FEW[std::min<int64_t>(8, M - m) - 1](w, in + m * K, out + m * F, i * 64, std::min<int64_t>(F, i * 64 + 64));
    });
  } else {
    parallel_for(pool, (int)((F + NR - 1) / NR), [&](int i) { many(w, in, M, out, i * NR); });
  }
  return ffi::Error::Success();
}
HANDLER(cpu_quantized_matmul, QuantizedImpl<false>, "packed", "group");
HANDLER(cpu_quantized_matmul_in_order, QuantizedImpl<true>, "packed", "group");

// ---------------------------------------------------------------- one token

// R rows at once share what is read of x, and hide each other's latencies. Codes that are numbers.
template <int R>
static void one_bytes(const Matrix& w, const float* x, float* y, int64_t f) {
  const int8_t* p = (const int8_t*)w.values + f * w.K;
  __m512 total[R];
  for (int r = 0; r < R; r++) total[r] = _mm512_setzero_ps();
  for (int64_t k0 = 0; k0 < w.I; k0 += w.group) {
    const int64_t k1 = std::min(w.I, k0 + w.group);  // x is zero past I, up to K
    __m512 sum[R][2];
    for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    const auto add = [&](int64_t k, int u) {
      const __m512 v = load16(x + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        sum[r][u] = _mm512_fmadd_ps(load16(p + r * w.K + k), v, sum[r][u]);
      }
    };
    for (int64_t k = k0; k < k1; k += 32) {
      for (int r = 0; r < R; r++) _mm_prefetch((const char*)(p + r * w.K + k + 2 * R * w.K), _MM_HINT_T0);
      add(k, 0);
      if (k + 16 < k1) add(k + 16, 1);
    }
    for (int r = 0; r < R; r++)
      total[r] = _mm512_fmadd_ps(_mm512_set1_ps(w.scales[k0 / w.group * w.O + f + r]),
                                 _mm512_add_ps(sum[r][0], sum[r][1]), total[r]);
  }
  for (int r = 0; r < R; r++) y[f + r] = _mm512_reduce_add_ps(total[r]);
}

// The same of packed codes and x in bfloat16: 32 codes become bfloat16 by one lookup (of the lowest five bits, of which
// the table does not heed the fifth). Groups of 32 inputs and more.
template <int R>
static void one_packed(const Matrix& w, __m512i table, const bf16* x, float* y, int64_t f) {
  const uint8_t* p = w.values + f * w.K / 2;
  const int64_t span = std::min<int64_t>(128, w.group);
  __m512 total[R];
  for (int r = 0; r < R; r++) total[r] = _mm512_setzero_ps();
  for (int64_t block = 0; block < w.I; block += 256)
    for (int64_t sub = 0; sub < std::min<int64_t>(128, w.I - block); sub += span) {
      const int64_t high = block + 128 + sub;
      const bool both = high < w.I;  // else the upper halves of bytes are padding
      __m512 a[R], b[R];
      for (int r = 0; r < R; r++) a[r] = b[r] = _mm512_setzero_ps();
      for (int64_t j = sub; j < sub + span && block + j < w.I; j += 32) {
        const __m512bh u = (__m512bh)_mm512_loadu_si512(x + block + j);
        const __m512bh v = (__m512bh)_mm512_loadu_si512(x + block + 128 + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const uint8_t* codes = p + r * w.K / 2 + block / 2 + j;
          _mm_prefetch((const char*)(codes + R * w.K), _MM_HINT_T0);
          const __m512i c = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
          a[r] = _mm512_dpbf16_ps(a[r], (__m512bh)_mm512_permutexvar_epi16(c, table), u);
          if (both)
            b[r] = _mm512_dpbf16_ps(b[r], (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(c, 4), table), v);
        }
      }
      for (int r = 0; r < R; r++) {
        const float* scales = w.scales + f + r;
        total[r] = _mm512_fmadd_ps(_mm512_set1_ps(scales[(block + sub) / w.group * w.O]), a[r], total[r]);
        if (both) total[r] = _mm512_fmadd_ps(_mm512_set1_ps(scales[high / w.group * w.O]), b[r], total[r]);
      }
    }
  for (int r = 0; r < R; r++) y[f + r] = _mm512_reduce_add_ps(total[r]);
}

static void one(const Matrix& w, const float* x, float* y, int64_t f0, int64_t f1) {
  if (w.kind == BYTES) {
    for (; f0 + 4 <= f1; f0 += 4) one_bytes<4>(w, x, y, f0);
    for (; f0 < f1; f0++) one_bytes<1>(w, x, y, f0);
    return;
  }
  static thread_local Scratch x_;
  bf16* rounded = x_.get<bf16>(w.K);
  for (int64_t k = 0; k < w.K; k += 32) _mm512_storeu_si512(rounded + k, row32(x + k, 0xffffffffu));
  const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(w.table)));
  for (; f0 + 4 <= f1; f0 += 4) one_packed<4>(w, table, rounded, y, f0);
  for (; f0 < f1; f0++) one_packed<1>(w, table, rounded, y, f0);
}

void quantized_few(const Matrix& w, int64_t M, bool round, const float* x, float* y, int64_t f0, int64_t f1) {
  if (M == 1 && w.group >= 32 && (w.kind == BYTES || round && !w.zeros)) return one(w, x, y, f0, f1);
  const Codes codes{w.values, w.scales, w.zeros, _mm512_loadu_ps(w.table), w.O, w.K,
                    w.group < w.K ? __builtin_ctzll(w.group) : 62, w.kind == NIBBLES};
  for (int64_t m = 0; m < M; m += 8) FEW[std::min<int64_t>(8, M - m) - 1](codes, x + m * w.K, y + m * w.O, f0, f1);
}
