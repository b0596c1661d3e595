// Matrix product as an XLA custom call: C = op(A) op(B), float32 or bfloat16.
#include "gemm.h"

static void gemm_f32(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Mat A, Mat B, float* C, int64_t ldc,
                     bool acc, More more) {
  static thread_local Scratch sb, sm;
  const int64_t panels = (N + NR - 1) / NR, KC = f32_chunk(K), chunks = (K + KC - 1) / KC;
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
  float* mp = sm.get<float>(panels * NR * more.K);
  if (more.K) F32::pack(mp, (const float*)more.B.p, more.B.ld, more.B.trans, more.K, N);
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
    if (more.K)
      F32::block(m, N, more.K, (const float*)more.A.p + m0 * more.A.ld, more.A.ld, false, mp, NR * more.K, C + m0 * ldc,
                 ldc, true);
  });
}

// A in bfloat16, [M, Kp] with zeros past K: where it lies, or copied.
template <typename SA>
static const bf16* bf16_rows(ffi::ThreadPool& pool, int64_t M, int64_t K, Mat A, int64_t* ld) {
  static thread_local Scratch s;
  const int64_t Kp = BF16::pad_k(K);
  if constexpr (std::is_same_v<SA, bf16>)
    if (!A.trans && Kp == K) return *ld = A.ld, (const bf16*)A.p;
  const SA* a = (const SA*)A.p;
  bf16* t = s.get<bf16>((M + 32) * Kp);
  parallel_for(pool, (int)((M + 31) / 32), [&](int i) {
    const int64_t m0 = i * 32, m1 = std::min(M, m0 + 32);
    if (A.trans) return bf16_transpose_a(t + m0 * Kp, Kp, a + m0, A.ld, K, m1 - m0);
    for (int64_t m = m0; m < m1; m++)
      for (int64_t k = 0; k < Kp; k += 32) _mm512_storeu_si512(t + m * Kp + k, row32(a + m * A.ld + k, first32(K - k)));
  });
  return *ld = Kp, t;
}

// A task is up to four panels of B and all rows of A, some at a time: what it packs and what it reads again and again
// stay in the second-level cache. Where that gives too few tasks for the threads, rows are shared out as well.
template <typename SA, typename SB, typename TC>
static void gemm_bf16(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Mat A, Mat B, TC* C, int64_t ldc,
                      bool acc, More more) {
  constexpr int64_t PACKED = 512 << 10, ROWS = 200 << 10;  // bytes
  static thread_local Scratch sm;
  const int64_t panels = (N + NR - 1) / NR, stride = BF16::panel(K), Kp = BF16::pad_k(K);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), most = PACKED / std::max<int64_t>(1, 2 * stride);
  const int64_t G = std::max<int64_t>(1, std::min({panels / (3 * threads), most, int64_t(4)}));
  const int64_t groups = (panels + G - 1) / G;
  const int64_t parts = std::max<int64_t>(1, std::min((2 * threads + groups - 1) / std::max<int64_t>(1, groups), (M + 63) / 64));
  const int64_t share = round_up((M + parts - 1) / parts, 32), step = std::max<int64_t>(64, ROWS / std::max<int64_t>(1, 2 * Kp) / 32 * 32);
  int64_t lda;
  const bf16* a = bf16_rows<SA>(pool, M, K, A, &lda);
  const SB* b = (const SB*)B.p;
  bf16* mp = sm.get<bf16>(panels * BF16::panel(more.K));
  if (more.K)
    of_type(more.B.is_bf16, [&](auto t) {
      BF16::pack(mp, (const decltype(t)*)more.B.p, more.B.ld, more.B.trans, more.K, N);
    });
  parallel_for(pool, (int)(groups * parts), [&](int i) {
    static thread_local Scratch sb;
    AmxScope amx;
    const int64_t p0 = i / parts * G, p1 = std::min(panels, p0 + G), n0 = p0 * NR, n = std::min(N, p1 * NR) - n0;
    bf16* bp = sb.get<bf16>(G * stride);
    for (int64_t k = 0; k < K; k += 32)  // rows of B through all panels, so that the memory is walked in order
      for (int64_t p = p0; p < p1; p++)
        bf16_pack_panel(bp + (p - p0) * stride + k * NR, b + (B.trans ? k : k * B.ld), B.ld, B.trans,
                        std::min<int64_t>(32, K - k), N, p * NR);
    for (int64_t m0 = i % parts * share, end = std::min(M, m0 + share); m0 < end; m0 += step) {
      const int64_t m = std::min(step, end - m0);
      BF16::block(m, n, Kp, a + m0 * lda, lda, false, bp, stride, C + m0 * ldc + n0, ldc, acc);
      if (more.K)
        BF16::block(m, n, more.K, (const SA*)more.A.p + m0 * more.A.ld, more.A.ld, false,
                    mp + p0 * BF16::panel(more.K), BF16::panel(more.K), C + m0 * ldc + n0, ldc, true);
    }
  });
}

void gemm(ffi::ThreadPool& pool, bool use_bf16, int64_t M, int64_t N, int64_t K, Mat A, Mat B, void* C, int64_t ldc,
          bool c_bf16, bool acc, More more) {
  if (!use_bf16) return gemm_f32(pool, M, N, K, A, B, (float*)C, ldc, acc, more);
  of_type(A.is_bf16, [&](auto a) {
    of_type(B.is_bf16, [&](auto b) {
      of_type(c_bf16, [&](auto c) {
        gemm_bf16<decltype(a), decltype(b)>(pool, M, N, K, A, B, (decltype(c)*)C, ldc, acc, more);
      });
    });
  });
}

// ---------------------------------------------------------------- a few rows

// Up to FEW rows (decoding) are multiplied straight from where the weights lie, in float32: the time is that of reading
// them once. Round: weights to bfloat16 first, as the product of more rows does.
constexpr int64_t FEW = 16;

template <typename T, bool Round>
static __m512 weight16(const T* p, __mmask16 m) {
  __m512 v = load16(p, m);
  return Round && std::is_same_v<T, float> ? rounded(v) : v;
}

// sum [M, N] = x[:, k0:k1] w[k0:k1], eight rows of w at once.
template <typename T, bool Round, int M>
static void few_plain(const float* x, int64_t ldx, const void* w_, float* sum, int64_t N, int64_t k0, int64_t k1) {
  const T* w = (const T*)w_;
  const int64_t ld = (N + 15) / 16 * 16;
  for (int64_t k = k0; k < k1; k += 8) {
    const int64_t rows = std::min<int64_t>(8, k1 - k);
    for (int64_t c = 0; c < N; c += 16) {
      const __mmask16 mask = first(N - c);
      __m512 v[8];
#pragma GCC unroll 8
      for (int64_t r = 0; r < 8; r++)
        v[r] = r < rows ? weight16<T, Round>(w + (k + r) * N + c, mask) : _mm512_setzero_ps();
      for (int m = 0; m < M; m++) {
        __m512 a = k == k0 ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + m * ld + c), b = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int r = 0; r < 8; r += 2) {
          a = _mm512_fmadd_ps(_mm512_set1_ps(x[m * ldx + k + r]), v[r], a);
          b = _mm512_fmadd_ps(_mm512_set1_ps(x[m * ldx + k + r + 1]), v[r + 1], b);
        }
        _mm512_storeu_ps(sum + m * ld + c, _mm512_add_ps(a, b));
      }
    }
  }
}

// y [M, n0:n1] = x w^T, w [N, K].
template <typename T, bool Round, int M>
static void few_turned(const float* x, int64_t ldx, const void* w_, float* y, int64_t ldy, int64_t K, int64_t n0,
                       int64_t n1) {
  for (int64_t n = n0; n < n1; n++) {
    const T* w = (const T*)w_ + n * K;
    constexpr int U = M <= 2 ? 4 : 2;
    __m512 sum[M][U];
    for (int m = 0; m < M; m++)
      for (int u = 0; u < U; u++) sum[m][u] = _mm512_setzero_ps();
    const auto add = [&](__m512 v, int64_t k, int u) {
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sum[m][u] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + m * ldx + k), sum[m][u]);
    };
    int64_t k = 0;
    for (; k + 16 * U <= K; k += 16 * U) {
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        const __m512 v = load16(w + k + 16 * u);
        add(Round && std::is_same_v<T, float> ? rounded(v) : v, k + 16 * u, u);
      }
    }
    for (; k < K; k += 16) add(weight16<T, Round>(w + k, first(K - k)), k, 0);
    for (int m = 0; m < M; m++) {
      for (int u = 1; u < U; u++) sum[m][0] = _mm512_add_ps(sum[m][0], sum[m][u]);
      y[m * ldy + n] = _mm512_reduce_add_ps(sum[m][0]);
    }
  }
}

template <typename T, bool Round, int M>
static void few(ffi::ThreadPool& pool, const float* x, int64_t ldx, const void* w, bool turned, float* sums, int64_t parts,
                int64_t N, int64_t K, int64_t ld) {
  if (turned) {
    // More rows than registers hold are multiplied eight at a time, while these weights are in the cache.
    parallel_for(pool, (int)((N + 63) / 64), [&](int i) {
      const int64_t n0 = i * 64, n1 = std::min<int64_t>(N, n0 + 64);
      few_turned<T, Round, std::min(M, 8)>(x, ldx, w, sums, ld, K, n0, n1);
      if constexpr (M > 8) few_turned<T, Round, M - 8>(x + 8 * ldx, ldx, w, sums + 8 * ld, ld, K, n0, n1);
    });
    return;
  }
  const int64_t chunk = ((K + parts - 1) / parts + 7) / 8 * 8;
  parallel_for(pool, (int)parts, [&](int i) {
    const int64_t k0 = std::min(K, i * chunk), k1 = std::min(K, k0 + chunk);
    if (k0 < k1) few_plain<T, Round, M>(x, ldx, w, sums + i * M * ld, N, k0, k1);
    else memset(sums + i * M * ld, 0, M * ld * sizeof(float));
  });
}

using Few = void (*)(ffi::ThreadPool&, const float*, int64_t, const void*, bool, float*, int64_t, int64_t, int64_t,
                     int64_t);
template <typename T, bool Round, int... M>
static Few few_of(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr Few all[] = {few<T, Round, M + 1>...};
  return all[rows - 1];
}

template <typename TA, typename TC>
static void few_rows(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, const TA* a, const void* b, bool b_bf16,
                     bool turned, bool use_bf16, TC* c) {
  static thread_local Scratch x_, sums_;
  const int64_t ldx = (K + 31) / 32 * 32, ld = (N + 15) / 16 * 16;
  const int64_t parts = turned ? 1 : std::min<int64_t>(8, std::max<int64_t>(1, K / 64));
  float *x = x_.get<float>(M * ldx), *sums = sums_.get<float>(parts * M * ld);
  for (int64_t m = 0; m < M; m++)
    for (int64_t k = 0; k < ldx; k += 16) {
      __m512 v = load16(a + m * K + k, first(K - k));
      _mm512_storeu_ps(x + m * ldx + k, use_bf16 ? rounded(v) : v);
    }
  constexpr std::make_integer_sequence<int, FEW> all;
  auto f = b_bf16 ? few_of<bf16, false>(M, all) : use_bf16 ? few_of<float, true>(M, all) : few_of<float, false>(M, all);
  f(pool, x, ldx, b, turned, sums, parts, N, K, ld);
  add_parts(sums, parts, M, N, ld, c);
}

static ffi::Error MatmulImpl(ffi::ThreadPool pool, Any a, Any b, AnyOut c, bool ta, bool tb) {
  const Mat A = mat(a, ta), B = mat(b, tb);
  const bool use_bf16 = A.is_bf16 || B.is_bf16;
  const int64_t M = a.dimensions()[ta ? 1 : 0], K = a.dimensions()[ta ? 0 : 1], N = b.dimensions()[tb ? 0 : 1];
  if (K != b.dimensions()[tb ? 1 : 0]) return ffi::Error::InvalidArgument("matmul: inner dimensions differ");
  if (!ta && M >= 1 && M <= FEW)
    typed(a, [&](auto* in) {
      typed(*c, [&](auto* out) { few_rows(pool, M, N, K, in, B.p, B.is_bf16, tb, use_bf16, out); });
    });
  else gemm(pool, use_bf16, M, N, K, A, B, c->untyped_data(), N, mat(*c, false).is_bf16, false);
  return ffi::Error::Success();
}
HANDLER(cpu_matmul, MatmulImpl, "ta", "tb");

// C = A op(B) + A2 op(B2); A2 is of A's type, B2 float32 or bfloat16.
static ffi::Error MatmulPlusImpl(ffi::ThreadPool pool, Any a, Any b, Any a2, Any b2, AnyOut c, bool tb) {
  const Mat A = mat(a, false), B = mat(b, tb), A2 = mat(a2, false), B2 = mat(b2, tb);
  const int64_t M = a.dimensions()[0], K = a.dimensions()[1], N = b.dimensions()[tb ? 0 : 1], K2 = a2.dimensions()[1];
  if (K != b.dimensions()[tb ? 1 : 0] || K2 != b2.dimensions()[tb ? 1 : 0] || M != a2.dimensions()[0] ||
      N != b2.dimensions()[tb ? 0 : 1] || A.is_bf16 != A2.is_bf16)
    return ffi::Error::InvalidArgument("matmul_plus: the operands do not fit");
  gemm(pool, A.is_bf16 || B.is_bf16, M, N, K, A, B, c->untyped_data(), N, mat(*c, false).is_bf16, false, {A2, B2, K2});
  return ffi::Error::Success();
}
HANDLER(cpu_matmul_plus, MatmulPlusImpl, "tb");
