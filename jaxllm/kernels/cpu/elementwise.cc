// RMSNorm, SwiGLU and RoPE, forward and backward, one pass over memory each; float32 inside, any mix of
// float32 and bfloat16 outside. XLA:CPU splits these into several passes and computes bfloat16 in scalar code.
#include "common.h"

template <typename F>
static void rows(ffi::ThreadPool& pool, int64_t M, const F& f) {
  int n = (int)std::max<int64_t>(1, std::min<int64_t>(16, M / 16));
  parallel_for(pool, n, [&](int i) { f(M * i / n, M * (i + 1) / n, i); });
}

// ---------------------------------------------------------------- RMSNorm: y = x * rsqrt(mean(x^2) + eps) * w

template <typename T>
static void rms_norm(ffi::ThreadPool& pool, int64_t M, int64_t D, const void* x_, const float* w, void* y_,
                     float* rstd, float eps) {
  rows(pool, M, [&](int64_t lo, int64_t hi, int) {
    for (int64_t r = lo; r < hi; r++) {
      const T* x = (const T*)x_ + r * D;
      T* y = (T*)y_ + r * D;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < D; c += 16) {
        __m512 v = load16(x + c, first(D - c));
        sum = _mm512_fmadd_ps(v, v, sum);
      }
      float s = 1.f / std::sqrt(_mm512_reduce_add_ps(sum) / D + eps);
      rstd[r] = s;
      for (int64_t c = 0; c < D; c += 16) {
        __mmask16 m = first(D - c);
        store16(y + c, _mm512_mul_ps(_mm512_mul_ps(load16(x + c, m), _mm512_set1_ps(s)), load16(w + c, m)), m);
      }
    }
  });
}

// dx = rstd * (dy w - xhat mean(dy w xhat)); dw = sum dy xhat, as 16 partial sums [16, D] added by the caller.
template <typename T>
static void rms_norm_grad(ffi::ThreadPool& pool, int64_t M, int64_t D, const void* x_, const float* w,
                          const float* rstd, const void* dy_, void* dx_, float* dw) {
  memset(dw, 0, 16 * D * sizeof(float));
  rows(pool, M, [&](int64_t lo, int64_t hi, int part) {
    float* dwp = dw + part * D;
    for (int64_t r = lo; r < hi; r++) {
      const T *x = (const T*)x_ + r * D, *dy = (const T*)dy_ + r * D;
      T* dx = (T*)dx_ + r * D;
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
}

// ---------------------------------------------------------------- SwiGLU: gate, up [M, F] -> silu(gate) * up

static inline __m512 sigmoid16(__m512 x) {
  __m512 one = _mm512_set1_ps(1.f), e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(one, _mm512_add_ps(one, e));
}

template <typename T>
static void swiglu(ffi::ThreadPool& pool, int64_t M, int64_t F, const void* gate, const void* up, void* y) {
  rows(pool, M, [&](int64_t lo, int64_t hi, int) {
    for (int64_t c = lo * F; c < hi * F; c += 16) {
      __mmask16 m = first(hi * F - c);
      __m512 a = load16((const T*)gate + c, m);
      store16((T*)y + c, _mm512_mul_ps(_mm512_mul_ps(a, sigmoid16(a)), load16((const T*)up + c, m)), m);
    }
  });
}

template <typename T>
static void swiglu_grad(ffi::ThreadPool& pool, int64_t M, int64_t F, const void* gate, const void* up,
                        const void* dy, void* dgate, void* dup) {
  rows(pool, M, [&](int64_t lo, int64_t hi, int) {
    for (int64_t c = lo * F; c < hi * F; c += 16) {
      __mmask16 m = first(hi * F - c);
      __m512 a = load16((const T*)gate + c, m), d = load16((const T*)dy + c, m), s = sigmoid16(a);
      __m512 silu = _mm512_mul_ps(a, s);  // its derivative: s + silu (1 - s)
      __m512 ds = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.f), s), s);
      store16((T*)dup + c, _mm512_mul_ps(d, silu), m);
      store16((T*)dgate + c, _mm512_mul_ps(_mm512_mul_ps(d, load16((const T*)up + c, m)), ds), m);
    }
  });
}

// ---------------------------------------------------------------- RoPE on [B*T, N, H], halves (a, b) rotated

// sign +1 rotates, -1 rotates back (the gradient). cos, sin: float32 [B*T, H/2].
template <typename T>
static void rope(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t H, const void* x_, const float* cos_,
                 const float* sin_, void* y_, float sign) {
  const int64_t h = H / 2;
  rows(pool, M, [&](int64_t lo, int64_t hi, int) {
    for (int64_t r = lo; r < hi; r++)
      for (int64_t n = 0; n < N; n++) {
        const T* x = (const T*)x_ + (r * N + n) * H;
        T* y = (T*)y_ + (r * N + n) * H;
        for (int64_t c = 0; c < h; c += 16) {
          __mmask16 m = first(h - c);
          __m512 a = load16(x + c, m), b = load16(x + h + c, m), co = load16(cos_ + r * h + c, m);
          __m512 si = _mm512_mul_ps(load16(sin_ + r * h + c, m), _mm512_set1_ps(sign));
          store16(y + c, _mm512_fnmadd_ps(b, si, _mm512_mul_ps(a, co)), m);
          store16(y + h + c, _mm512_fmadd_ps(a, si, _mm512_mul_ps(b, co)), m);
        }
      }
  });
}

// ---------------------------------------------------------------- handlers

using Any = ffi::AnyBuffer;
using AnyOut = ffi::Result<ffi::AnyBuffer>;
using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::Result<ffi::Buffer<ffi::F32>>;
#define PICK(f, x) ((x).element_type() == ffi::BF16 ? f<bf16> : f<float>)
#define OP(name, impl, bind) XLA_FFI_DEFINE_HANDLER_SYMBOL(name, impl, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() bind)

static ffi::Error RmsNorm(ffi::ThreadPool pool, Any x, Floats w, AnyOut y, FloatsOut rstd, float eps) {
  PICK(rms_norm, x)(pool, x.dimensions()[0], x.dimensions()[1], x.untyped_data(), w.typed_data(), y->untyped_data(),
                    rstd->typed_data(), eps);
  return ffi::Error::Success();
}
static ffi::Error RmsNormGrad(ffi::ThreadPool pool, Any x, Floats w, Floats rstd, Any dy, AnyOut dx, FloatsOut dw) {
  PICK(rms_norm_grad, x)(pool, x.dimensions()[0], x.dimensions()[1], x.untyped_data(), w.typed_data(),
                         rstd.typed_data(), dy.untyped_data(), dx->untyped_data(), dw->typed_data());
  return ffi::Error::Success();
}
static ffi::Error SwiGlu(ffi::ThreadPool pool, Any gate, Any up, AnyOut y) {
  int64_t F = gate.dimensions().back(), M = gate.element_count() / F;
  PICK(swiglu, gate)(pool, M, F, gate.untyped_data(), up.untyped_data(), y->untyped_data());
  return ffi::Error::Success();
}
static ffi::Error SwiGluGrad(ffi::ThreadPool pool, Any gate, Any up, Any dy, AnyOut dgate, AnyOut dup) {
  int64_t F = gate.dimensions().back(), M = gate.element_count() / F;
  PICK(swiglu_grad, gate)(pool, M, F, gate.untyped_data(), up.untyped_data(), dy.untyped_data(),
                          dgate->untyped_data(), dup->untyped_data());
  return ffi::Error::Success();
}
static ffi::Error Rope(ffi::ThreadPool pool, Any x, Floats cos, Floats sin, AnyOut y, float sign) {
  auto d = x.dimensions();
  PICK(rope, x)(pool, d[0], d[1], d[2], x.untyped_data(), cos.typed_data(), sin.typed_data(), y->untyped_data(), sign);
  return ffi::Error::Success();
}
OP(cpu_rms_norm, RmsNorm, .Arg<Any>().Arg<Floats>().Ret<Any>().Ret<Floats>().Attr<float>("eps"));
OP(cpu_rms_norm_grad, RmsNormGrad, .Arg<Any>().Arg<Floats>().Arg<Floats>().Arg<Any>().Ret<Any>().Ret<Floats>());
OP(cpu_swiglu, SwiGlu, .Arg<Any>().Arg<Any>().Ret<Any>());
OP(cpu_swiglu_grad, SwiGluGrad, .Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>().Ret<Any>());
OP(cpu_rope, Rope, .Arg<Any>().Arg<Floats>().Arg<Floats>().Ret<Any>().Attr<float>("sign"));
