// Shared pieces of the CPU kernels: threads, scratch memory, vector helpers.
//
// Everything here needs AVX-512 (F, BW, DQ, VL) and AVX512-BF16; the Python side checks the CPU flags
// before it compiles this code. AMX is used where the compiler and the kernel both offer it.
#pragma once
#include <immintrin.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using bf16 = uint16_t;  // storage only: all arithmetic is float32

// ---------------------------------------------------------------- handlers

using Any = ffi::AnyBuffer;
using AnyOut = ffi::Result<ffi::AnyBuffer>;
using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::Result<ffi::Buffer<ffi::F32>>;
using Ints = ffi::Buffer<ffi::S32>;

// f(pointer to the numbers of x, which are float32 or bfloat16).
template <typename F>
auto typed(const Any& x, const F& f) {
  return x.element_type() == ffi::BF16 ? f((bf16*)x.untyped_data()) : f((float*)x.untyped_data());
}

// f(a number of the type), which only says the type.
template <typename F>
auto of_type(bool is_bf16, const F& f) {
  return is_bf16 ? f(bf16()) : f(float());
}

// The numbers of an array that may be left out: then it is empty.
template <typename B>
auto given(const B& x) -> decltype(x.typed_data()) {
  return x.element_count() ? x.typed_data() : nullptr;
}

// What XLA hands to an implementation, by the types of its parameters; the names are those of its attributes, the last.
struct Attributes {
  std::array<const char*, 9> names;

  template <typename... P>
  auto To(ffi::Error (*implementation)(P...)) const {
    return bound(ffi::Ffi::Bind(), names.data(), implementation, (void (*)(P...))nullptr);
  }

 private:
  template <typename Binding, typename F>
  static auto bound(Binding&& binding, const char* const*, F implementation, void (*)()) {
    return binding.To(implementation);
  }
  template <typename Binding, typename F, typename P, typename... Rest>
  static auto bound(Binding&& binding, const char* const* name, F implementation, void (*)(P, Rest...)) {
    const auto next = [&](auto&& more) {
      return bound(std::move(more), name, implementation, (void (*)(Rest...))nullptr);
    };
    if constexpr (std::is_same_v<P, ffi::ThreadPool>) return next(std::move(binding).template Ctx<P>());
    else if constexpr (std::is_same_v<P, ffi::RemainingArgs>) return next(std::move(binding).RemainingArgs());
    else if constexpr (std::is_same_v<P, ffi::RemainingRets>) return next(std::move(binding).RemainingRets());
    else if constexpr (!std::is_void_v<typename ffi::ArgBinding<P>::Arg>)
      return next(std::move(binding).template Arg<P>());
    else if constexpr (!std::is_void_v<typename ffi::RetBinding<P>::Ret>)
      return next(std::move(binding).template Ret<typename ffi::RetBinding<P>::Ret>());
    else return next(std::move(binding).template Attr<P>(*name++));
  }
};
// Defines the symbol that Python registers; after the implementation come the names of its attributes, in their order.
#define HANDLER(symbol, implementation, ...) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, implementation, (Attributes{{__VA_ARGS__}}))

// ---------------------------------------------------------------- threads

// Runs f(0) .. f(n-1) on XLA's own thread pool. The caller takes tasks too and only waits for tasks that
// another thread has already begun, so it cannot deadlock even when every pool thread is busy.
template <typename F>
void parallel_for(ffi::ThreadPool& pool, int n, const F& f) {
  struct State {
    std::atomic<int> next{0}, done{0};
    int n;
    const F* f;
  };
  if (n <= 1) {
    if (n == 1) f(0);
    return;
  }
  auto s = std::make_shared<State>();
  s->n = n;
  s->f = &f;
  auto work = [s] {
    for (int i; (i = s->next.fetch_add(1)) < s->n; s->done.fetch_add(1, std::memory_order_release)) (*s->f)(i);
  };
  int helpers = (int)std::min<int64_t>(n, std::max<int64_t>(1, pool.num_threads())) - 1;
  for (int i = 0; i < helpers; i++) pool.Schedule(std::function<void()>(work));
  work();
  for (int spin = 0; s->done.load(std::memory_order_acquire) < n; spin++) {
    if (spin > 4096) sched_yield();
    else _mm_pause();
  }
}

static inline int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

// ---------------------------------------------------------------- scratch memory

// A buffer that grows and is reused: page faults cost more than many of these kernels.
struct Scratch {
  void* p = nullptr;
  size_t size = 0;
  template <typename T>
  T* get(size_t n) {
    size_t bytes = (n * sizeof(T) + (1 << 21) - 1) & ~size_t((1 << 21) - 1);
    if (bytes > size) {
      free(p);
      p = aligned_alloc(1 << 21, bytes);
      madvise(p, bytes, MADV_HUGEPAGE);
      size = bytes;
    }
    return (T*)p;
  }
  ~Scratch() { free(p); }
};

// ---------------------------------------------------------------- vectors

static inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
static inline __m512 load16(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline __m512 load16(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline void store16(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
static inline void store16(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
static inline __m512 load16(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
static inline __m512 load16(const bf16* p, __mmask16 m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
static inline void store16(float* p, __m512 v, __mmask16 m) { _mm512_mask_storeu_ps(p, m, v); }
static inline void store16(bf16* p, __m512 v, __mmask16 m) {
  _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v));
}
static inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

// Rounded to bfloat16.
static inline __m512 rounded(__m512 v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16));
}

// exp to about 1 ulp: 2^n * poly(r), r = x - n ln 2 in [-ln2/2, ln2/2]. exp(-inf) is 0.
static inline __m512 exp16(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
  p = _mm512_add_ps(p, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

// Transposes 16 vectors of 16 32-bit words in place.
static inline void transpose16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // r[4g+i] holds column i (mod 4) of rows 4g..4g+3 in each 128-bit lane
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
