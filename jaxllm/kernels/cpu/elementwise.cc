// RMSNorm, SwiGLU and RoPE, forward and backward, and LayerNorm: one pass over memory each; float32 inside, float32 or
// bfloat16 outside. XLA:CPU splits these into several passes and computes bfloat16 in scalar code.
#include "rows.h"

// f(first row, the row after the last, part) for up to 16 parts of M rows.
template <typename F>
static ffi::Error rows(ffi::ThreadPool& pool, int64_t M, const F& f) {
  int n = (int)std::max<int64_t>(1, std::min<int64_t>(16, M / 16));
  parallel_for(pool, n, [&](int i) { f(M * i / n, M * (i + 1) / n, i); });
  return ffi::Error::Success();
}

// The numbers of another array, of x's type.
template <typename T>
static T* as(T*, const Any& other) {
  return (T*)other.untyped_data();
}

// ---------------------------------------------------------------- RMSNorm: y = x * rsqrt(mean(x^2) + eps) * w

static ffi::Error RmsNorm(ffi::ThreadPool pool, Any X, Floats W, AnyOut Y, FloatsOut Rstd, float eps) {
  const int64_t D = X.dimensions()[1];
  return typed(X, [&](auto* x) {
    auto* y = as(x, *Y);
    const float* w = W.typed_data();
    float* rstd = Rstd->typed_data();
    return rows(pool, X.dimensions()[0], [=](int64_t lo, int64_t hi, int) {
      for (int64_t r = lo; r < hi; r++) rstd[r] = rms_norm_row(x + r * D, w, eps, D, y + r * D);
    });
  });
}
HANDLER(cpu_rms_norm, RmsNorm, "eps");

// dx = rstd * (dy w - xhat mean(dy w xhat)); dw = sum dy xhat, as 16 partial sums [16, D] added by the caller.
static ffi::Error RmsNormGrad(ffi::ThreadPool pool, Any X, Floats W, Floats Rstd, Any Dy, AnyOut Dx, FloatsOut Dw) {
  const int64_t D = X.dimensions()[1];
  return typed(X, [&](auto* x_) {
    auto *dy_ = as(x_, Dy), *dx_ = as(x_, *Dx);
    const float *w = W.typed_data(), *rstd = Rstd.typed_data();
    float* dw = Dw->typed_data();
    memset(dw, 0, 16 * D * sizeof(float));
    return rows(pool, X.dimensions()[0], [=](int64_t lo, int64_t hi, int part) {
      float* dwp = dw + part * D;
      for (int64_t r = lo; r < hi; r++) {
        auto *x = x_ + r * D, *dy = dy_ + r * D, *dx = dx_ + r * D;
        __m512 sum = _mm512_setzero_ps(), s = _mm512_set1_ps(rstd[r]);
        for (int64_t c = 0; c < D; c += 16) {
          __mmask16 m = first(D - c);
          __m512 xh = _mm512_mul_ps(load16(x + c, m), s), d = load16(dy + c, m), t = _mm512_mul_ps(d, xh);
          store16(dwp + c, _mm512_add_ps(load16(dwp + c, m), t), m);
          sum = _mm512_fmadd_ps(t, load16(w + c, m), sum);
        }
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / D);
        for (int64_t c = 0; c < D; c += 16) {
          __mmask16 m = first(D - c);
          __m512 xh = _mm512_mul_ps(load16(x + c, m), s);
          __m512 v = _mm512_fnmadd_ps(xh, mean, _mm512_mul_ps(load16(dy + c, m), load16(w + c, m)));
          store16(dx + c, _mm512_mul_ps(v, s), m);
        }
      }
    });
  });
}
HANDLER(cpu_rms_norm_grad, RmsNormGrad);

// ---------------------------------------------------------------- LayerNorm: y = (x - mean) rsqrt(var + eps) * w + b

static ffi::Error LayerNorm(ffi::ThreadPool pool, Any X, Floats W, Floats B, AnyOut Y, float eps) {
  const int64_t D = X.dimensions()[1];
  return typed(X, [&](auto* x_) {
    auto* y_ = as(x_, *Y);
    const float *w = W.typed_data(), *b = B.typed_data();
    return rows(pool, X.dimensions()[0], [=](int64_t lo, int64_t hi, int) {
      for (int64_t r = lo; r < hi; r++) {
        auto* x = x_ + r * D;
        __m512 sum = _mm512_setzero_ps(), square = _mm512_setzero_ps();
        for (int64_t c = 0; c < D; c += 16) sum = _mm512_add_ps(sum, load16(x + c, first(D - c)));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / D);
        for (int64_t c = 0; c < D; c += 16) {
          const __mmask16 m = first(D - c);
          const __m512 v = _mm512_maskz_sub_ps(m, load16(x + c, m), mean);
          square = _mm512_fmadd_ps(v, v, square);
        }
        const __m512 scale = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(square) / D + eps));
        for (int64_t c = 0; c < D; c += 16) {
          const __mmask16 m = first(D - c);
          const __m512 v = _mm512_mul_ps(_mm512_sub_ps(load16(x + c, m), mean), scale);
          store16(y_ + r * D + c, _mm512_fmadd_ps(v, load16(w + c, m), load16(b + c, m)), m);
        }
      }
    });
  });
}
HANDLER(cpu_layer_norm, LayerNorm, "eps");

// ---------------------------------------------------------------- SwiGLU: gate, up [M, F] -> silu(gate) * up

static inline __m512 sigmoid16(__m512 x) {
  __m512 one = _mm512_set1_ps(1.f), e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(one, _mm512_add_ps(one, e));
}

static ffi::Error SwiGlu(ffi::ThreadPool pool, Any Gate, Any Up, AnyOut Y) {
  const int64_t F = Gate.dimensions().back();
  return typed(Gate, [&](auto* gate) {
    auto *up = as(gate, Up), *y = as(gate, *Y);
    return rows(pool, Gate.element_count() / F, [=](int64_t lo, int64_t hi, int) {
      for (int64_t c = lo * F; c < hi * F; c += 16) {
        __mmask16 m = first(hi * F - c);
        __m512 a = load16(gate + c, m);
        store16(y + c, _mm512_mul_ps(_mm512_mul_ps(a, sigmoid16(a)), load16(up + c, m)), m);
      }
    });
  });
}
HANDLER(cpu_swiglu, SwiGlu);

static ffi::Error SwiGluGrad(ffi::ThreadPool pool, Any Gate, Any Up, Any Dy, AnyOut Dgate, AnyOut Dup) {
  const int64_t F = Gate.dimensions().back();
  return typed(Gate, [&](auto* gate) {
    auto *up = as(gate, Up), *dy = as(gate, Dy), *dgate = as(gate, *Dgate), *dup = as(gate, *Dup);
    return rows(pool, Gate.element_count() / F, [=](int64_t lo, int64_t hi, int) {
      for (int64_t c = lo * F; c < hi * F; c += 16) {
        __mmask16 m = first(hi * F - c);
        __m512 a = load16(gate + c, m), d = load16(dy + c, m), s = sigmoid16(a);
        __m512 silu = _mm512_mul_ps(a, s);  // its derivative: s + silu (1 - s)
        __m512 ds = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.f), s), s);
        store16(dup + c, _mm512_mul_ps(d, silu), m);
        store16(dgate + c, _mm512_mul_ps(_mm512_mul_ps(d, load16(up + c, m)), ds), m);
      }
    });
  });
}
HANDLER(cpu_swiglu_grad, SwiGluGrad);

// ---------------------------------------------------------------- RoPE on [B*T, N, H], halves (a, b) rotated

// sign +1 rotates, -1 rotates back (the gradient). cos, sin: float32 [B*T, H/2].
static ffi::Error Rope(ffi::ThreadPool pool, Any X, Floats Cos, Floats Sin, AnyOut Y, float sign) {
  const int64_t N = X.dimensions()[1], H = X.dimensions()[2];
  return typed(X, [&](auto* x) {
    auto* y = as(x, *Y);
    const float *cos = Cos.typed_data(), *sin = Sin.typed_data();
    return rows(pool, X.dimensions()[0], [=](int64_t lo, int64_t hi, int) {
      for (int64_t r = lo; r < hi; r++)
        for (int64_t at = r * N * H; at < (r + 1) * N * H; at += H)
          rope_row(x + at, cos + r * H / 2, sin + r * H / 2, H, sign, y + at);
    });
  });
}
HANDLER(cpu_rope, Rope, "sign");
