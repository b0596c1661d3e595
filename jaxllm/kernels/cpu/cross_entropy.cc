// Statistics of a language-model head's logits and a gradient of them, a chunk of tokens at a time.
//
// The logits of a chunk exist once, in scratch, and become their own gradient there (Liger kernel, Hsu et al. 2024):
// (k0 + k1 lse) softmax - k2 onehot(target) - k3, with four coefficients for each token. The head's own gradient is left
// out where its buffer is empty. Tokens whose target is UNWANTED have no logits at all: zeros stand for their results.
#include "gemm.h"

// Row of V logits -> lse, target's logit, largest, sum; with gradients, the row is overwritten by them.
static void row(float* z, int64_t V, int32_t target, const float* k, float* stats, int64_t M, bool grad) {
  __m512 top = _mm512_set1_ps(-INFINITY), plain = _mm512_setzero_ps();
  for (int64_t c = 0; c < V; c += 16) {
    top = _mm512_max_ps(top, _mm512_mask_loadu_ps(top, first(V - c), z + c));
    plain = _mm512_add_ps(plain, _mm512_maskz_loadu_ps(first(V - c), z + c));
  }
  float mx = _mm512_reduce_max_ps(top), at = target >= 0 && target < V ? z[target] : 0.f;
  __m512 m = _mm512_set1_ps(mx), sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < V; c += 16) {
    __mmask16 k = first(V - c);
    __m512 e = _mm512_maskz_mov_ps(k, exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(k, z + c), m)));
    if (grad) _mm512_mask_storeu_ps(z + c, k, e);
    sum = _mm512_add_ps(sum, e);
  }
  float total = _mm512_reduce_add_ps(sum), lse = mx + std::log(total);
  stats[0] = lse, stats[M] = at, stats[2 * M] = mx, stats[3 * M] = _mm512_reduce_add_ps(plain);
  if (!grad) return;
  __m512 s = _mm512_set1_ps((k[0] + k[M] * lse) / total), u = _mm512_set1_ps(k[3 * M]);
  for (int64_t c = 0; c < V; c += 16) {
    __mmask16 k = first(V - c);
    _mm512_mask_storeu_ps(z + c, k, _mm512_fmsub_ps(_mm512_maskz_loadu_ps(k, z + c), s, u));
  }
  if (target >= 0 && target < V) z[target] -= k[2 * M];
}

template <typename G>
static void run(ffi::ThreadPool& pool, const void* x_, Mat head, bool transposed, const int32_t* targets, const float* k,
                int64_t M, int64_t D, int64_t V, float* stats, void* dx_, float* dhead, bool grad) {
  using T = typename G::T;
  static thread_local Scratch sl, sb, sf, sg;
  const int64_t C = std::min<int64_t>(M, 512), MB = 64, panels = (V + NR - 1) / NR, stride = G::panel(D);
  const T* x = (const T*)x_;
  T* dx = (T*)dx_;
  T* fwd = sf.get<T>(panels * stride);  // head packed for x @ head
  auto pack = [&](T* dst, int64_t st, bool trans, int64_t K, int64_t N) {
    int64_t np = (N + NR - 1) / NR;
    parallel_for(pool, (int)std::min<int64_t>(np, 16), [&](int i) {
      int64_t n = std::min<int64_t>(np, 16);
      for (int64_t p = np * i / n; p < np * (i + 1) / n; p++) {
        if constexpr (std::is_same_v<T, float>) f32_pack_panel(dst + p * st, (const float*)head.p, head.ld, trans, K, N, p * NR);
        else if (head.is_bf16) bf16_pack_panel(dst + p * st, (const bf16*)head.p, head.ld, trans, K, N, p * NR);
        else bf16_pack_panel(dst + p * st, (const float*)head.p, head.ld, trans, K, N, p * NR);
      }
    });
  };
  pack(fwd, stride, transposed, D, V);
  const int64_t dpanels = (D + NR - 1) / NR, dstride = G::panel(V);
  T* bwd = nullptr;
  if (grad) bwd = sg.get<T>(dpanels * dstride), pack(bwd, dstride, !transposed, V, D);
  const int64_t ld = (V + 31) / 32 * 32;
  float* z = sl.get<float>(C * ld);
  T* zt = std::is_same_v<T, float> ? (T*)z : sb.get<T>(C * ld);
  for (int64_t c0 = 0; c0 < M; c0 += C) {
    int64_t n = std::min(C, M - c0);
    parallel_for(pool, (int)((n + MB - 1) / MB), [&](int i) {
      AmxScope amx;
      int64_t r0 = i * MB, rows = std::min(MB, n - r0);
      G::block(rows, V, D, x + (c0 + r0) * D, D, false, fwd, stride, z + r0 * ld, ld, false);
      for (int64_t r = r0; r < r0 + rows; r++) {
        row(z + r * ld, V, targets[c0 + r], k + c0 + r, stats + c0 + r, M, grad);
        if constexpr (!std::is_same_v<T, float>)
          if (grad)
            for (int64_t v = 0; v < ld; v += 32) _mm512_storeu_si512(zt + r * ld + v, row32(z + r * ld + v, first32(V - v)));
      }
      if (!grad) return;
      // Float32 in pieces of V, so that a packed panel stays in the first-level cache.
      for (int64_t k = 0, piece = std::is_same_v<T, float> ? 256 : V; k < V; k += piece)
        G::block(rows, D, std::min(piece, V - k), zt + r0 * ld + k, ld, false, bwd + G::k_offset(k), dstride,
                 dx + (c0 + r0) * D, D, k > 0);
    });
    if (!grad || !dhead) continue;
    const bool b = !std::is_same_v<T, float>;
    Mat zm{zt, ld, false, b}, xm{x + c0 * D, D, false, b};
    if (transposed) zm.trans = true, gemm(pool, b, V, D, n, zm, xm, dhead, D, false, c0 > 0);
    else xm.trans = true, gemm(pool, b, D, V, n, xm, zm, dhead, V, false, c0 > 0);
  }
}

constexpr int32_t UNWANTED = INT32_MIN;

// `run` on the wanted tokens: where they are not all, those are moved together and what comes of them is moved back.
template <typename G>
static void run_wanted(ffi::ThreadPool& pool, const void* x_, Mat head, bool transposed, const int32_t* targets,
                       const float* k, int64_t M, int64_t D, int64_t V, float* stats, void* dx_, float* dhead,
                       bool grad) {
  using T = typename G::T;
  std::vector<int64_t> at;
  for (int64_t m = 0; m < M; m++)
    if (targets[m] != UNWANTED) at.push_back(m);
  const int64_t n = (int64_t)at.size();
  if (n == M) return run<G>(pool, x_, head, transposed, targets, k, M, D, V, stats, dx_, dhead, grad);
  static thread_local Scratch sx, sd, st, sk, ss;
  const T* x = (const T*)x_;
  T *dx = (T*)dx_, *x2 = sx.get<T>(n * D + 1), *dx2 = grad ? sd.get<T>(n * D + 1) : nullptr;
  int32_t* t2 = st.get<int32_t>(n + 1);
  float *k2 = sk.get<float>(4 * n + 1), *stats2 = ss.get<float>(4 * n + 1);
  for (int64_t i = 0; i < n; i++) {
    memcpy(x2 + i * D, x + at[i] * D, D * sizeof(T));
    t2[i] = targets[at[i]];
    for (int64_t j = 0; j < 4; j++) k2[j * n + i] = k[j * M + at[i]];
  }
  memset(stats, 0, 4 * M * sizeof(float));
  if (grad) memset(dx, 0, M * D * sizeof(T));
  if (n == 0) {
    if (dhead) memset(dhead, 0, V * D * sizeof(float));
    return;
  }
  run<G>(pool, x2, head, transposed, t2, k2, n, D, V, stats2, dx2, dhead, grad);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < 4; j++) stats[j * M + at[i]] = stats2[j * n + i];
    if (grad) memcpy(dx + at[i] * D, dx2 + i * D, D * sizeof(T));
  }
}

static ffi::Error CrossEntropyImpl(ffi::ThreadPool pool, Any x, Any head, Ints targets, Floats coefficients,
                                   FloatsOut stats, AnyOut dx, FloatsOut dhead, bool transposed, bool grad) {
  int64_t M = x.dimensions()[0], D = x.dimensions()[1], V = head.dimensions()[transposed ? 0 : 1];
  auto f = x.element_type() == ffi::BF16 ? run_wanted<BF16> : run_wanted<F32>;
  f(pool, x.untyped_data(), mat(head, false), transposed, targets.typed_data(), coefficients.typed_data(), M, D, V,
    stats->typed_data(), dx->untyped_data(), given(*dhead), grad);
  return ffi::Error::Success();
}
HANDLER(cpu_cross_entropy, CrossEntropyImpl, "transposed", "grad");

// The statistics of logits [M, V] that are in memory: the same sums for a row as above.
static ffi::Error StatisticsImpl(ffi::ThreadPool pool, Floats logits, Ints targets, FloatsOut stats) {
  const int64_t M = logits.dimensions()[0], V = logits.dimensions()[1];
  parallel_for(pool, (int)M, [&](int r) {
    row(logits.typed_data() + r * V, V, targets.typed_data()[r], nullptr, stats->typed_data() + r, M, false);
  });
  return ffi::Error::Success();
}
HANDLER(cpu_logit_statistics, StatisticsImpl);
