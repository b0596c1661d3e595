// Attention over [B, T, N, H] with causal, window and segment masks, forward and backward.
//
// One task is one (batch, kv head): its keys and values are packed once and stay in the second-level cache
// while blocks of 64 queries pass. Scores of a block live in a [64, S] float32 scratch, so the softmax is the plain
// two-pass one; keys outside the block's causal/window range are skipped. The backward pass recomputes the scores
// from the saved log-sum-exp (FlashAttention-2, Dao 2023, algorithm 2) and keeps dK, dV in scratch: no atomics.
#include "gemm.h"

struct Shape {
  int64_t B, T, S, N, K, H, window;
  bool causal;
  float scale;
  const int32_t *q_seg, *kv_seg;  // null without segments
  const int32_t* offset;          // of a row's first query among the keys; null: 0

  int64_t first_query(int64_t b) const { return offset ? offset[b] : 0; }
};

constexpr int64_t BQ = 64;

// Keys [lo, hi) that some query of rows [i0, i0 + n) may see; lo is a multiple of 32, and below S.
static void key_range(const Shape& s, int64_t b, int64_t i0, int64_t n, int64_t* lo, int64_t* hi) {
  *lo = 0, *hi = s.S;
  i0 += s.first_query(b);
  if (s.causal) *hi = std::min(s.S, i0 + n);
  if (s.window > 0) {
    *lo = std::min(std::max<int64_t>(0, i0 - s.window + 1), s.S - 1) / 32 * 32;
    if (!s.causal) *hi = std::min(s.S, i0 + n - 1 + s.window);
  }
  *hi = std::max(*hi, *lo);
}

// Same for one query row, exact.
static void row_range(const Shape& s, int64_t b, int64_t i, int64_t* lo, int64_t* hi) {
  *lo = 0, *hi = s.S;
  i += s.first_query(b);
  if (s.causal) *hi = std::min(s.S, i + 1);
  if (s.window > 0) {
    *lo = std::max<int64_t>(0, i - s.window + 1);
    if (!s.causal) *hi = std::min(s.S, i + s.window);
  }
}

static inline __mmask16 visible(const Shape& s, int64_t b, int64_t i, int64_t j, int64_t rlo, int64_t rhi) {
  __mmask16 m = first(rhi - j) & ~first(rlo - j);
  if (s.q_seg && m) {
    int32_t seg = s.q_seg[b * s.T + i];
    if (seg == 0) return 0;
    m = _mm512_mask_cmpeq_epi32_mask(m, _mm512_set1_epi32(seg), _mm512_maskz_loadu_epi32(m, s.kv_seg + b * s.S + j));
  }
  return m;
}

// Scores [n, hi-lo] -> probabilities in place (unnormalised rows scaled by 1/sum) and lse. Masked entries become 0.
static void softmax_rows(const Shape& s, int64_t b, int64_t i0, int64_t n, int64_t lo, int64_t hi, float* p, int64_t ld,
                         float* lse) {
  for (int64_t r = 0; r < n; r++, p += ld) {
    int64_t i = i0 + r, rlo, rhi;
    row_range(s, b, i, &rlo, &rhi);
    __m512 sc = _mm512_set1_ps(s.scale), neg = _mm512_set1_ps(-INFINITY), mx = neg;
    int64_t width = round_up(hi - lo, 32), c_end = std::min(width, round_up(std::max<int64_t>(rhi - lo, 0), 16));
    for (int64_t c = 0; c < c_end; c += 16) {
      __mmask16 m = visible(s, b, i, lo + c, rlo, rhi);
      __m512 v = _mm512_mask_mul_ps(neg, m, _mm512_load_ps(p + c), sc);
      _mm512_store_ps(p + c, v);
      mx = _mm512_max_ps(mx, v);
    }
    float top = _mm512_reduce_max_ps(mx);
    if (top == -INFINITY) {  // a row that sees nothing: zeros, and an lse that makes exp(score - lse) zero too
      memset(p, 0, width * sizeof(float));
      lse[r] = INFINITY;
      continue;
    }
    __m512 sum = _mm512_setzero_ps(), t = _mm512_set1_ps(top);
    for (int64_t c = 0; c < c_end; c += 16) {
      __m512 v = _mm512_load_ps(p + c);
      v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, neg, _CMP_NEQ_OQ), exp16(_mm512_sub_ps(v, t)));
      _mm512_store_ps(p + c, v);
      sum = _mm512_add_ps(sum, v);
    }
    float total = _mm512_reduce_add_ps(sum);
    __m512 inv = _mm512_set1_ps(1.f / total);
    for (int64_t c = 0; c < c_end; c += 16) _mm512_store_ps(p + c, _mm512_mul_ps(_mm512_load_ps(p + c), inv));
    memset(p + c_end, 0, (width - c_end) * sizeof(float));
    lse[r] = top + std::log(total);
  }
}

// f32 [rows, width] -> bf16 copy for the next product (float32 is used as it is).
static const bf16* operand(const float* p, int64_t ld, int64_t rows, int64_t width, bf16* out) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < width; c += 32) _mm512_store_si512(out + r * ld + c, row32(p + r * ld + c, ~0u));
  return out;
}
static const float* operand(const float* p, int64_t, int64_t, int64_t, float*) { return p; }

// x [S, H] for products that sum over S, up to a multiple of 32: zeros past S.
template <typename G, typename T>
static void pack_rows(T* dst, const T* x, int64_t ld, int64_t S, int64_t H) {
  const int64_t Sp = round_up(S, 32);
  for (int64_t n = 0; n < H; n += NR, dst += G::panel(Sp)) {
    if constexpr (std::is_same_v<T, float>) {
      f32_pack_panel(dst, x, ld, false, S, H, n);
      memset(dst + S * NR, 0, (Sp - S) * NR * sizeof(float));
    } else {
      bf16_pack_panel(dst, x, ld, false, S, H, n);
    }
  }
}

template <typename G>
static void attend(const Shape& s, const void* q_, const void* k_, const void* v_, void* o_, float* lse, int64_t b,
                   int64_t kh) {
  using T = typename G::T;
  static thread_local Scratch sk, sv, sp, sp2, so;
  AmxScope amx;
  const int64_t G_ = s.N / s.K, H = s.H, Sp = round_up(s.S, 32), qs = s.N * H, ks = s.K * H;
  const T *q = (const T*)q_ + b * s.T * qs, *k = (const T*)k_ + b * s.S * ks + kh * H;
  const T* v = (const T*)v_ + b * s.S * ks + kh * H;
  T* o = (T*)o_ + b * s.T * qs;
  const int64_t kt_stride = G::panel(H), v_stride = G::panel(Sp);
  T *kt = sk.get<T>(Sp / NR * kt_stride), *vp = sv.get<T>(round_up(H, NR) / NR * v_stride);
  G::pack(kt, k, ks, true, H, s.S);  // [H, S]
  pack_rows<G>(vp, v, ks, s.S, H);
  float* p = sp.get<float>(BQ * Sp);
  T* p2 = sp2.get<T>(BQ * Sp);
  for (int64_t g = 0; g < G_; g++) {
    int64_t head = kh * G_ + g;
    for (int64_t i0 = 0; i0 < s.T; i0 += BQ) {
      int64_t n = std::min(BQ, s.T - i0), lo, hi;
      key_range(s, b, i0, n, &lo, &hi);
      int64_t w = round_up(hi - lo, 32);
      const T* qi = q + i0 * qs + head * H;
      G::block(n, w, H, qi, qs, false, kt + lo / NR * kt_stride, kt_stride, p, Sp, false);
      softmax_rows(s, b, i0, n, lo, hi, p, Sp, lse + (b * s.N + head) * s.T + i0);
      G::block(n, H, w, operand(p, Sp, n, w, p2), Sp, false, vp + G::k_offset(lo), v_stride, o + i0 * qs + head * H,
               qs, false);
    }
  }
}

template <typename G>
static void attend_grad(const Shape& s, const void* q_, const void* k_, const void* v_, const void* o_,
                        const float* lse, const void* do_, void* dq_, void* dk_, void* dv_, int64_t b, int64_t kh) {
  using T = typename G::T;
  static thread_local Scratch skt, svt, sk, sdk, sdv, sp, sd, sp2, sq2, sdo2;
  AmxScope amx;
  const int64_t G_ = s.N / s.K, H = s.H, Hp = round_up(H, 32), Sp = round_up(s.S, 32), qs = s.N * H, ks = s.K * H;
  const T *q = (const T*)q_ + b * s.T * qs, *k = (const T*)k_ + b * s.S * ks + kh * H;
  const T *v = (const T*)v_ + b * s.S * ks + kh * H, *o = (const T*)o_ + b * s.T * qs;
  const T* d_o = (const T*)do_ + b * s.T * qs;
  const int64_t t_stride = G::panel(H), s_stride = G::panel(Sp), q_stride = G::panel(BQ);
  T *kt = skt.get<T>(Sp / NR * t_stride), *vt = svt.get<T>(Sp / NR * t_stride), *kp = sk.get<T>(Hp / NR * s_stride);
  G::pack(kt, k, ks, true, H, s.S);
  G::pack(vt, v, ks, true, H, s.S);
  pack_rows<G>(kp, k, ks, s.S, H);
  float *dk = sdk.get<float>(Sp * Hp), *dv = sdv.get<float>(Sp * Hp), *p = sp.get<float>(BQ * Sp);
  float* ds = sd.get<float>(BQ * Sp);
  memset(dk, 0, Sp * Hp * sizeof(float));
  memset(dv, 0, Sp * Hp * sizeof(float));
  T *p2 = sp2.get<T>(BQ * Sp), *qp = sq2.get<T>(Hp / NR * q_stride), *dop = sdo2.get<T>(Hp / NR * q_stride);
  for (int64_t g = 0; g < G_; g++) {
    int64_t head = kh * G_ + g;
    for (int64_t i0 = 0; i0 < s.T; i0 += BQ) {
      int64_t n = std::min(BQ, s.T - i0), lo, hi;
      key_range(s, b, i0, n, &lo, &hi);
      int64_t w = round_up(hi - lo, 32), at = i0 * qs + head * H;
      if (w == 0) {
        for (int64_t r = 0; r < n; r++) memset((T*)dq_ + b * s.T * qs + at + r * qs, 0, H * sizeof(T));
        continue;
      }
      G::block(n, w, H, q + at, qs, false, kt + lo / NR * t_stride, t_stride, p, Sp, false);     // scores
      G::block(n, w, H, d_o + at, qs, false, vt + lo / NR * t_stride, t_stride, ds, Sp, false);  // dP
      for (int64_t r = 0; r < n; r++) {
        int64_t i = i0 + r, rlo, rhi;
        row_range(s, b, i, &rlo, &rhi);
        __m512 acc = _mm512_setzero_ps();
        for (int64_t c = 0; c < H; c += 16) {
          __mmask16 m = first(H - c);
          acc = _mm512_fmadd_ps(load16(o + at + r * qs + c, m), load16(d_o + at + r * qs + c, m), acc);
        }
        __m512 delta = _mm512_set1_ps(_mm512_reduce_add_ps(acc)), sc = _mm512_set1_ps(s.scale);
        __m512 l = _mm512_set1_ps(lse[(b * s.N + head) * s.T + i]);
        float *pr = p + r * Sp, *dr = ds + r * Sp;
        for (int64_t c = 0; c < w; c += 16) {
          __mmask16 m = visible(s, b, i, lo + c, rlo, rhi);
          __m512 e = _mm512_setzero_ps();
          if (m) e = _mm512_maskz_mov_ps(m, exp16(_mm512_fmsub_ps(_mm512_load_ps(pr + c), sc, l)));
          __m512 d = _mm512_mul_ps(_mm512_mul_ps(e, sc), _mm512_sub_ps(_mm512_load_ps(dr + c), delta));
          _mm512_store_ps(pr + c, e);
          _mm512_store_ps(dr + c, _mm512_maskz_mov_ps(m, d));
        }
      }
      G::pack(dop, d_o + at, qs, false, n, H);
      G::pack(qp, q + at, qs, false, n, H);
      const int64_t pn = G::panel(n);
      G::block(w, H, n, operand(p, Sp, n, w, p2), Sp, true, dop, pn, dv + lo * Hp, Hp, true);
      const T* d2 = operand(ds, Sp, n, w, p2);
      G::block(w, H, n, d2, Sp, true, qp, pn, dk + lo * Hp, Hp, true);
      G::block(n, H, w, d2, Sp, false, kp + G::k_offset(lo), s_stride, (T*)dq_ + b * s.T * qs + at, qs, false);
    }
  }
  for (int64_t j = 0; j < s.S; j++)
    for (int64_t c = 0; c < H; c += 16) {
      __mmask16 m = first(H - c);
      int64_t at = (b * s.S + j) * ks + kh * H + c;
      store16((T*)dk_ + at, load16(dk + j * Hp + c), m);
      store16((T*)dv_ + at, load16(dv + j * Hp + c), m);
    }
}

static Shape shape_of(Any q, Any k, Ints qs, Ints ks, Ints offset, bool causal, int64_t window, float scale) {
  auto a = q.dimensions(), b = k.dimensions();
  return {a[0], a[1], b[1], a[2], b[2], a[3], window, causal, scale, given(qs), given(ks), given(offset)};
}

static ffi::Error AttentionImpl(ffi::ThreadPool pool, Any q, Any k, Any v, Ints qs, Ints ks, Ints offset, AnyOut o,
                                FloatsOut lse, bool causal, int64_t window, float scale) {
  Shape s = shape_of(q, k, qs, ks, offset, causal, window, scale);
  auto f = q.element_type() == ffi::BF16 ? attend<BF16> : attend<F32>;
  parallel_for(pool, (int)(s.B * s.K), [&](int i) {
    f(s, q.untyped_data(), k.untyped_data(), v.untyped_data(), o->untyped_data(), lse->typed_data(), i / s.K, i % s.K);
  });
  return ffi::Error::Success();
}

static ffi::Error AttentionGradImpl(ffi::ThreadPool pool, Any q, Any k, Any v, Ints qs, Ints ks, Ints offset, Any o,
                                    Floats lse, Any d_o, AnyOut dq, AnyOut dk, AnyOut dv, bool causal, int64_t window,
                                    float scale) {
  Shape s = shape_of(q, k, qs, ks, offset, causal, window, scale);
  auto f = q.element_type() == ffi::BF16 ? attend_grad<BF16> : attend_grad<F32>;
  parallel_for(pool, (int)(s.B * s.K), [&](int i) {
    f(s, q.untyped_data(), k.untyped_data(), v.untyped_data(), o.untyped_data(), lse.typed_data(), d_o.untyped_data(),
      dq->untyped_data(), dk->untyped_data(), dv->untyped_data(), i / s.K, i % s.K);
  });
  return ffi::Error::Success();
}

HANDLER(cpu_attention, AttentionImpl, "causal", "window", "scale");
HANDLER(cpu_attention_grad, AttentionGradImpl, "causal", "window", "scale");
