// Products with int8, int4 and nf4 weights as an XLA custom call: y = x W, float32. Layout: kernels/quantized/weights.py.
//
// A few tokens (decoding): each weight row is unpacked into registers once and multiplied with every token, so the time
// is that of reading the codes. More tokens: 32 rows at a time become a packed panel in the first-level cache, which
// the dense product's inner kernel multiplies.
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

template <int M>
static void few(const Codes& w, const float* x, float* y, int64_t f0, int64_t f1) {
  for (int64_t f = f0; f < f1; f++) {
    __m512 sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    w.row(f, 0, w.K, [&](int64_t k, __m512 v) {
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sum[m][k >> 4 & 1] = _mm512_fmadd_ps(v, load16(x + m * w.K + k), sum[m][k >> 4 & 1]);
    });
    for (int m = 0; m < M; m++) y[m * w.F + f] = _mm512_reduce_add_ps(_mm512_add_ps(sum[m][0], sum[m][1]));
  }
}

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

static ffi::Error QuantizedImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values,
                                ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::F32> zeros,
                                ffi::Buffer<ffi::F32> table, ffi::Result<ffi::Buffer<ffi::F32>> y, bool packed,
                                int64_t group) {
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1], F = values.dimensions()[0];
  if (values.dimensions()[1] * (packed ? 2 : 1) != K || K % (packed ? 256 : 128) ||
      (group < K && (group < 16 || (group & (group - 1)))))
    return ffi::Error::InvalidArgument("quantized_matmul: shapes disagree");
  const int64_t shift = group < K ? __builtin_ctzll(group) : 62;
  Codes w{(const uint8_t*)values.untyped_data(), scales.typed_data(),
          zeros.element_count() ? zeros.typed_data() : nullptr, _mm512_loadu_ps(table.typed_data()), F, K, shift, packed};
  const float* in = x.typed_data();
  float* out = y->typed_data();
  if (M <= 4) {
    auto f = M == 1 ? few<1> : M == 2 ? few<2> : M == 3 ? few<3> : few<4>;
    parallel_for(pool, (int)((F + 63) / 64), [&](int i) { f(w, in, out, i * 64, std::min<int64_t>(F, i * 64 + 64)); });
  } else {
    parallel_for(pool, (int)((F + NR - 1) / NR), [&](int i) { many(w, in, M, out, i * NR); });
  }
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_quantized_matmul, QuantizedImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>().Attr<bool>("packed")
                                  .Attr<int64_t>("group"));
