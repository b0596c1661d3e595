// Matrix product as an XLA custom call: C = op(A) op(B), float32 or bfloat16.
#include "gemm.h"

static int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

static void gemm_f32(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Mat A, Mat B, float* C, int64_t ldc,
                     bool acc) {
  static thread_local Scratch sb;
  const int64_t panels = (N + NR - 1) / NR, chunks = (K + 319) / 320, KC = round_up((K + chunks - 1) / chunks, 16);
  float* bp = sb.get<float>(panels * NR * K);
  const float *a = (const float*)A.p, *b = (const float*)B.p;
  // packed: [chunk of K][panel][k][32]
  parallel_for(pool, (int)std::min<int64_t>(panels, 16), [&](int i) {
    int64_t lo = panels * i / std::min<int64_t>(panels, 16), hi = panels * (i + 1) / std::min<int64_t>(panels, 16);
    for (int64_t ch = 0; ch < chunks; ch++) {
      int64_t k0 = ch * KC, kc = std::min(KC, K - k0);
      const float* bk = b + (B.trans ? k0 : k0 * B.ld);
      float* dst = bp + panels * NR * k0;
      // Rows of B are read whole, 16 at a time: a panel's own 128 bytes of each would touch a page for each row.
      int64_t rows = B.trans ? kc : 16;
      for (int64_t k = 0; k < kc; k += rows)
        for (int64_t p = lo; p < hi; p++)
          f32_pack_panel(dst + (p * kc + k) * NR, bk + (B.trans ? k : k * B.ld), B.ld, B.trans, std::min(rows, kc - k), N, p * NR);
    }
  });
  // Blocks of up to 192 rows, whose packed chunk fits the second-level cache; as many for each thread.
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  int64_t mc = round_up((M + threads - 1) / threads, MR);
  if (mc > 192) mc = round_up((M + round_up((M + 191) / 192, threads) - 1) / round_up((M + 191) / 192, threads), MR);
  parallel_for(pool, (int)((M + mc - 1) / mc), [&](int i) {
    int64_t m0 = i * mc, m = std::min(mc, M - m0);
    for (int64_t ch = 0; ch < chunks; ch++) {
      int64_t k0 = ch * KC, kc = std::min(KC, K - k0);
      F32::block(m, N, kc, a + (A.trans ? k0 * A.ld + m0 : m0 * A.ld + k0), A.ld, A.trans, bp + panels * NR * k0,
                 NR * kc, C + m0 * ldc, ldc, acc || ch > 0);
    }
  });
}

template <typename SA, typename SB, typename TC>
static void gemm_bf16(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Mat A, Mat B, TC* C, int64_t ldc,
                      bool acc) {
  static thread_local Scratch sb;
  const int64_t panels = (N + NR - 1) / NR, stride = BF16::panel(K);
  bf16* bp = sb.get<bf16>(panels * stride);
  const SA* a = (const SA*)A.p;
  int groups = (int)std::min<int64_t>(panels, 16);
  parallel_for(pool, groups, [&](int i) {
    for (int64_t p = panels * i / groups; p < panels * (i + 1) / groups; p++)
      bf16_pack_panel(bp + p * stride, (const SB*)B.p, B.ld, B.trans, K, N, p * NR);
  });
  int64_t mc = std::min<int64_t>(128, std::max<int64_t>(32, round_up((M + 7) / 8, 32)));
  parallel_for(pool, (int)((M + mc - 1) / mc), [&](int i) {
    AmxScope amx;
    int64_t m0 = i * mc, m = std::min(mc, M - m0);
    BF16::block(m, N, K, a + (A.trans ? m0 : m0 * A.ld), A.ld, A.trans, bp, stride, C + m0 * ldc, ldc, acc);
  });
}

template <typename SA, typename SB>
static void gemm_bf16_out(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Mat A, Mat B, void* C, int64_t ldc,
                          bool c_bf16, bool acc) {
  if (c_bf16) gemm_bf16<SA, SB, bf16>(pool, M, N, K, A, B, (bf16*)C, ldc, acc);
  else gemm_bf16<SA, SB, float>(pool, M, N, K, A, B, (float*)C, ldc, acc);
}

void gemm(ffi::ThreadPool& pool, bool use_bf16, int64_t M, int64_t N, int64_t K, Mat A, Mat B, void* C, int64_t ldc,
          bool c_bf16, bool acc) {
  if (!use_bf16) return gemm_f32(pool, M, N, K, A, B, (float*)C, ldc, acc);
  auto f = A.is_bf16 ? (B.is_bf16 ? gemm_bf16_out<bf16, bf16> : gemm_bf16_out<bf16, float>)
                     : (B.is_bf16 ? gemm_bf16_out<float, bf16> : gemm_bf16_out<float, float>);
  f(pool, M, N, K, A, B, C, ldc, c_bf16, acc);
}

static ffi::Error MatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> c,
                             bool ta, bool tb) {
  auto da = a.dimensions(), db = b.dimensions();
  bool ab = a.element_type() == ffi::BF16, bb = b.element_type() == ffi::BF16;
  bool cb = c->element_type() == ffi::BF16;
  int64_t M = ta ? da[1] : da[0], K = ta ? da[0] : da[1], N = tb ? db[0] : db[1];
  if (K != (tb ? db[1] : db[0])) return ffi::Error::InvalidArgument("matmul: inner dimensions differ");
  gemm(pool, ab || bb, M, N, K, {a.untyped_data(), da[1], ta, ab}, {b.untyped_data(), db[1], tb, bb},
       c->untyped_data(), N, cb, false);
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_matmul, MatmulImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>().Attr<bool>("ta").Attr<bool>("tb"));
