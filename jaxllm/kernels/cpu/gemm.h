// Matrix products on packed operands: float32 (AVX-512 FMA) and bfloat16 (AMX tiles, or AVX512-BF16).
//
// Names: C[M,N] (+)= A[M,K] B[K,N]. B is packed into panels of 32 columns that the inner kernel streams
// through the first-level cache (Goto & van de Geijn 2008); A is read in place when its rows run along K.
#pragma once
#include "common.h"

struct Mat {  // op(X)[r, c] = trans ? p[c * ld + r] : p[r * ld + c]
  const void* p;
  int64_t ld;
  bool trans;
  bool is_bf16;
};

static inline Mat mat(const Any& x, bool trans) {
  return {x.untyped_data(), x.dimensions()[1], trans, x.element_type() == ffi::BF16};
}

constexpr int NR = 32;  // columns of a packed panel

// ---------------------------------------------------------------- float32

constexpr int MR = 12;  // rows of the register block: 12 x 32 floats are 24 of the 32 vector registers

// R rows of C; element (r, k) of A is a[r * rs + k * cs], panel row k is b[k * 32 ...]. PACKED: rs is 1, cs is 12.
// Meanwhile `ahead` bytes a step are fetched from `soon`, the panel after this one, into the second-level cache.
template <int R, bool PACKED>
static void f32_micro(int64_t K, const float* a, int64_t rs, int64_t cs, const float* b, float* c, int64_t ldc,
                      bool acc, __mmask16 m0, __mmask16 m1, const char* soon, int64_t ahead) {
  if (PACKED) rs = 1, cs = MR;
  __m512 c0[R], c1[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    c0[r] = c1[r] = _mm512_setzero_ps();
    _mm_prefetch((const char*)(c + r * ldc), _MM_HINT_T0);
    _mm_prefetch((const char*)(c + r * ldc + 16), _MM_HINT_T0);
  }
  constexpr int G = (R + 2) / 3;  // one pointer per three rows: x86 addresses base + {0, 1, 2} * stride
  const float* p[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) p[g] = a + 3 * g * rs;
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; k++, b += NR) {
    __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + 16);
    _mm_prefetch(soon + k * ahead, _MM_HINT_T1);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      __m512 x = _mm512_set1_ps(PACKED ? a[k * MR + r] : p[r / 3][(r % 3) * rs]);
      c0[r] = _mm512_fmadd_ps(x, b0, c0[r]);
      c1[r] = _mm512_fmadd_ps(x, b1, c1[r]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) p[g] += cs;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++, c += ldc) {
    if (acc) {
      c0[r] = _mm512_add_ps(c0[r], _mm512_maskz_loadu_ps(m0, c));
      c1[r] = _mm512_add_ps(c1[r], _mm512_maskz_loadu_ps(m1, c + 16));
    }
    _mm512_mask_storeu_ps(c, m0, c0[r]);
    _mm512_mask_storeu_ps(c + 16, m1, c1[r]);
  }
}

template <bool PACKED>
static inline void f32_rows(int rows, int64_t K, const float* a, int64_t rs, int64_t cs, const float* b, float* c,
                            int64_t ldc, bool acc, __mmask16 m0, __mmask16 m1, const char* soon, int64_t ahead) {
  switch (rows) {
#define ROWS(R) \
  case R: return f32_micro<R, PACKED>(K, a, rs, cs, b, c, ldc, acc, m0, m1, soon, ahead);
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#undef ROWS
  }
}

// A -> blocks of 12 rows, [block][k][12], `stride` floats apart; rows past M hold anything.
static void f32_pack_a(float* dst, int64_t stride, const float* a, int64_t lda, bool trans, int64_t M, int64_t K) {
  if (trans) {  // rows of A run along M: whole rows are read, so that the memory is walked in order
    for (int64_t k = 0; k < K; k++)
      for (int64_t m = 0; m < M; m += MR) {
        __mmask16 mask = first(std::min<int64_t>(MR, M - m));
        _mm512_mask_storeu_ps(dst + m / MR * stride + k * MR, first(MR), load16(a + k * lda + m, mask));
      }
    return;
  }
  for (int64_t m = 0; m < M; m += MR, dst += stride)
    for (int64_t k = 0; k < K; k += 16) {
      __m512i t[16];
      for (int i = 0; i < 16; i++)
        t[i] = _mm512_castps_si512(i < MR && m + i < M ? load16(a + (m + i) * lda + k, first(K - k)) : _mm512_setzero_ps());
      transpose16(t);
      for (int i = 0; i < 16 && k + i < K; i++)
        _mm512_mask_storeu_ps(dst + (k + i) * MR, first(MR), _mm512_castsi512_ps(t[i]));
    }
}

// One panel (columns n0 .. n0+31) of B[K, N]; columns past N become 0.
static void f32_pack_panel(float* dst, const float* p, int64_t ld, bool trans, int64_t K, int64_t N, int64_t n0) {
  int64_t n = std::min<int64_t>(NR, N - n0);
  if (!trans) {
    __mmask16 m0 = first(n), m1 = first(n - 16);
    for (int64_t k = 0; k < K; k++, dst += NR) {
      _mm512_store_ps(dst, load16(p + k * ld + n0, m0));
      _mm512_store_ps(dst + 16, load16(p + k * ld + n0 + 16, m1));
    }
    return;
  }
  for (int64_t k = 0; k < K; k += 16)
    for (int h = 0; h < 2; h++) {
      __m512i t[16];
      for (int i = 0; i < 16; i++) {
        int64_t j = h * 16 + i;
        t[i] = _mm512_castps_si512(j < n ? load16(p + (n0 + j) * ld + k, first(K - k)) : _mm512_setzero_ps());
      }
      transpose16(t);
      for (int i = 0; i < 16 && k + i < K; i++) _mm512_store_si512(dst + (k + i) * NR + h * 16, t[i]);
    }
}

struct F32 {
  using T = float;
  // floats in one packed panel
  static int64_t panel(int64_t K) { return K * NR; }
  static int64_t k_offset(int64_t k) { return k * NR; }
  static void pack(float* dst, const float* p, int64_t ld, bool trans, int64_t K, int64_t N) {
    for (int64_t n = 0; n < N; n += NR) f32_pack_panel(dst + n * K, p, ld, trans, K, N, n);
  }
  // C[M,N] (+)= A B. bp: packed panels, `stride` floats apart. A is packed here too, unless few panels would use it.
  static void block(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, bool trans, const float* bp,
                    int64_t stride, float* c, int64_t ldc, bool acc) {
    static thread_local Scratch s;
    const bool packed = trans || N >= 8 * NR;
    int64_t step = MR * lda;
    if (packed) {
      step = MR * K + 16;  // not a multiple of 4096 bytes: the blocks must not compete for the same cache lines
      float* t = s.get<float>((M + MR) / MR * step);
      f32_pack_a(t, step, a, lda, trans, M, K);
      a = t;
    }
    const int64_t ahead = NR * sizeof(float) * MR / std::max<int64_t>(M, MR);
    for (int64_t n = 0; n < N; n += NR, bp += stride) {
      __mmask16 m0 = first(N - n), m1 = first(N - n - 16);
      for (int64_t m = 0; m < M; m += MR) {
        int rows = (int)std::min<int64_t>(MR, M - m);
        const float* am = a + m / MR * step;
        const char* soon = (const char*)(bp + stride) + m / MR * K * ahead;
        if (packed) f32_rows<true>(rows, K, am, 1, MR, bp, c + m * ldc + n, ldc, acc, m0, m1, soon, ahead);
        else f32_rows<false>(rows, K, am, lda, 1, bp, c + m * ldc + n, ldc, acc, m0, m1, soon, ahead);
      }
    }
  }
};

// ---------------------------------------------------------------- bfloat16

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
// Linux hands out the 8 KiB of tile state only on request (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
static const bool amx_ok = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
struct AmxScope {  // tile shapes (8 tiles of 16 rows x 64 bytes) are a per-thread register
  AmxScope() {
    if (!amx_ok) return;
    alignas(64) uint8_t cfg[64] = {1};
    for (int i = 0; i < 8; i++) cfg[16 + 2 * i] = 64, cfg[48 + i] = 16;
    _tile_loadconfig(cfg);
  }
  ~AmxScope() {
    if (amx_ok) _tile_release();
  }
};
#else
static const bool amx_ok = false;
struct AmxScope {
  ~AmxScope() {}
};
#endif

// 16 bfloat16 pairs: rows k and k+1 of 16 (x2) columns, interleaved as the tile unit wants them.
static inline void pairs32(__m512i lo, __m512i hi, __m512i* out) {
  const __m512i i0 = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                      5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i i1 = _mm512_add_epi16(i0, _mm512_set1_epi16(16));
  out[0] = _mm512_permutex2var_epi16(lo, i0, hi);
  out[1] = _mm512_permutex2var_epi16(lo, i1, hi);
}
static inline __m512i row32(const bf16* p, __mmask32 m) { return _mm512_maskz_loadu_epi16(m, p); }
static inline __m512i row32(const float* p, __mmask32 m) {
  return (__m512i)_mm512_cvtne2ps_pbh(load16(p + 16, (__mmask16)(m >> 16)), load16(p, (__mmask16)m));
}
static inline __m512i row32(const int8_t* p, __mmask32) {  // without a mask: codes come in whole blocks
  return (__m512i)_mm512_cvtne2ps_pbh(load16(p + 16), load16(p));
}
static inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

// Panel layout: [K/32][2 halves of 16 columns][16 pairs of k][16 columns][2], 2048 bytes per 32 k.
template <typename S>
static void bf16_pack_panel(bf16* dst, const S* p, int64_t ld, bool trans, int64_t K, int64_t N, int64_t n0) {
  int64_t n = std::min<int64_t>(NR, N - n0);
  for (int64_t k = 0; k < K; k += 32, dst += 1024) {
    if (!trans) {
      __mmask32 m = first32(n);
      for (int i = 0; i < 16; i++) {
        __m512i out[2], z = _mm512_setzero_si512();
        int64_t r = k + 2 * i;
        _mm_prefetch((const char*)(p + (r + 64) * ld + n0), _MM_HINT_T0);
        _mm_prefetch((const char*)(p + (r + 65) * ld + n0), _MM_HINT_T0);
        pairs32(r < K ? row32(p + r * ld + n0, m) : z, r + 1 < K ? row32(p + (r + 1) * ld + n0, m) : z, out);
        _mm512_store_si512(dst + i * 32, out[0]);
        _mm512_store_si512(dst + 512 + i * 32, out[1]);
      }
    } else {
      __mmask32 m = first32(K - k);
      for (int h = 0; h < 2; h++) {
        __m512i t[16];
        for (int i = 0; i < 16; i++)
          t[i] = h * 16 + i < n ? row32(p + (n0 + h * 16 + i) * ld + k, m) : _mm512_setzero_si512();
        transpose16(t);
        for (int i = 0; i < 16; i++) _mm512_store_si512(dst + h * 512 + i * 32, t[i]);
      }
    }
  }
}

// A given as [K, M] (rows of M) -> row-major [M up to 32][Kp], zero where k >= K.
template <typename S>
static void bf16_transpose_a(bf16* dst, int64_t ldd, const S* p, int64_t ld, int64_t K, int64_t M) {
  for (int64_t m = 0; m < M; m += 32)
    for (int64_t k = 0; k < K; k += 32) {
      __m512i t0[16], t1[16], out[2], z = _mm512_setzero_si512();
      __mmask32 mask = first32(M - m);
      for (int i = 0; i < 16; i++) {
        int64_t r = k + 2 * i;
        pairs32(r < K ? row32(p + r * ld + m, mask) : z, r + 1 < K ? row32(p + (r + 1) * ld + m, mask) : z, out);
        t0[i] = out[0], t1[i] = out[1];
      }
      transpose16(t0);
      transpose16(t1);
      for (int i = 0; i < 16; i++) {
        _mm512_storeu_si512(dst + (m + i) * ldd + k, t0[i]);
        _mm512_storeu_si512(dst + (m + 16 + i) * ldd + k, t1[i]);
      }
    }
}

// 32 x 32 block: out[32 * 32] = A[32, Kp] (row-major, lda) times one panel.
static inline void bf16_micro(int64_t Kp, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, bool acc) {
#ifdef HAVE_AMX
  if (amx_ok) {
    asm volatile("" ::: "memory");  // gcc does not know that tile loads read memory
    const int64_t la = lda * 2, lc = ldc * 4;
    const bf16* a1 = a + 16 * lda;
    if (acc) {
      _tile_loadd(0, c, lc);
      _tile_loadd(1, c + 16, lc);
      _tile_loadd(2, c + 16 * ldc, lc);
      _tile_loadd(3, c + 16 * ldc + 16, lc);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < Kp; k += 32, b += 1024) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a + k, la);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 512, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a1 + k, la);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, lc);
    _tile_stored(1, c + 16, lc);
    _tile_stored(2, c + 16 * ldc, lc);
    _tile_stored(3, c + 16 * ldc + 16, lc);
    return;
  }
#endif
  for (int r0 = 0; r0 < 32; r0 += 8) {  // 8 x 32 block in 16 registers
    __m512 c0[8], c1[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      c0[r] = acc ? _mm512_loadu_ps(c + (r0 + r) * ldc) : _mm512_setzero_ps();
      c1[r] = acc ? _mm512_loadu_ps(c + (r0 + r) * ldc + 16) : _mm512_setzero_ps();
    }
    const bf16 *ar = a + r0 * lda, *bb = b;
    for (int64_t k = 0; k < Kp; k += 32, bb += 1024)
      for (int i = 0; i < 16; i++) {
        __m512bh b0 = (__m512bh)_mm512_load_si512(bb + i * 32), b1 = (__m512bh)_mm512_load_si512(bb + 512 + i * 32);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
          __m512bh x = (__m512bh)_mm512_set1_epi32(*(const int*)(ar + r * lda + k + 2 * i));
          c0[r] = _mm512_dpbf16_ps(c0[r], x, b0);
          c1[r] = _mm512_dpbf16_ps(c1[r], x, b1);
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      _mm512_storeu_ps(c + (r0 + r) * ldc, c0[r]);
      _mm512_storeu_ps(c + (r0 + r) * ldc + 16, c1[r]);
    }
  }
}

struct BF16 {
  using T = bf16;
  static int64_t pad_k(int64_t K) { return (K + 31) / 32 * 32; }
  static int64_t panel(int64_t K) { return pad_k(K) * NR; }
  static int64_t k_offset(int64_t k) { return k * NR; }  // k must be a multiple of 32
  template <typename S>
  static void pack(bf16* dst, const S* p, int64_t ld, bool trans, int64_t K, int64_t N) {
    for (int64_t n = 0; n < N; n += NR) bf16_pack_panel(dst + n * pad_k(K), p, ld, trans, K, N, n);
  }
  // Needs an AmxScope around it. `a` is bfloat16 or float32 (rounded while it is copied).
  template <typename S, typename C>
  static void block(int64_t M, int64_t N, int64_t K, const S* a, int64_t lda, bool trans, const bf16* bp,
                    int64_t stride, C* c, int64_t ldc, bool acc) {
    static thread_local Scratch s;
    alignas(64) float tiles[2][32 * 32];
    int64_t Kp = pad_k(K), whole = M / 32 * 32;  // rows that can be read in place
    const bf16* direct = nullptr;
    if constexpr (std::is_same_v<S, bf16>)
      if (!trans && Kp == K) direct = a;
    bf16* t = s.get<bf16>((M + 32) * Kp + 32);
    if (trans) {
      bf16_transpose_a(t, Kp, a, lda, K, M);
    } else {
      for (int64_t m = direct ? whole : 0; m < M; m++)
        for (int64_t k = 0; k < Kp; k += 32) _mm512_storeu_si512(t + m * Kp + k, row32(a + m * lda + k, first32(K - k)));
    }
    // What a tile has stored is read only after the next one has been started: reading it at once would wait for it.
    int64_t pm = -1, pn = 0;
    int which = 0;
    const auto finish = [&] {
      if (pm < 0) return;
      const float* done = tiles[which ^ 1];
      const __mmask16 m0 = first(N - pn), m1 = first(N - pn - 16);
      for (int64_t r = 0; r < std::min<int64_t>(32, M - pm); r++) {
        C* d = c + (pm + r) * ldc + pn;
        __m512 v0 = _mm512_load_ps(done + r * 32), v1 = _mm512_load_ps(done + r * 32 + 16);
        if (acc) v0 = _mm512_add_ps(v0, load16(d, m0)), v1 = _mm512_add_ps(v1, load16(d + 16, m1));
        store16(d, v0, m0);
        store16(d + 16, v1, m1);
      }
      pm = -1;
    };
    for (int64_t n = 0; n < N; n += NR, bp += stride)
      for (int64_t m = 0; m < M; m += 32) {
        bool in_place = direct && m < whole;
        const bf16* am = in_place ? direct + m * lda : t + m * Kp;
        int64_t la = in_place ? lda : Kp;
        if constexpr (std::is_same_v<C, float>)
          if (m + 32 <= M && n + 32 <= N) {
            bf16_micro(Kp, am, la, bp, c + m * ldc + n, ldc, acc);
            continue;
          }
        bf16_micro(Kp, am, la, bp, tiles[which], 32, false);
        finish();
        pm = m, pn = n, which ^= 1;
      }
    finish();
  }
};

// ---------------------------------------------------------------- whole products

// A float32 product is summed along K in chunks of so many: each from 0 on in the order of k, then chunk after chunk.
static inline int64_t f32_chunk(int64_t K) {
  const int64_t chunks = (K + 319) / 320;
  return chunks ? ((K + chunks - 1) / chunks + 15) / 16 * 16 : 16;
}

// out [M, N] = the sum over parts of sums [parts, M, ld], in their order.
template <typename T>
static void add_parts(const float* sums, int64_t parts, int64_t M, int64_t N, int64_t ld, T* out) {
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n += 16) {
      const __mmask16 mask = first(N - n);
      __m512 v = load16(sums + m * ld + n, mask);
      for (int64_t i = 1; i < parts; i++) v = _mm512_add_ps(v, load16(sums + (i * M + m) * ld + n, mask));
      store16(out + m * N + n, v, mask);
    }
}

// C = A B over all threads. Float32 inputs: exact float32. bf16 compute: operands rounded to bfloat16, float32 sums.
// With `more`, C += A2 B2 too, while a block of C is still in the cache.
struct More {
  Mat A, B;
  int64_t K = 0;
};
void gemm(ffi::ThreadPool& pool, bool use_bf16, int64_t M, int64_t N, int64_t K, Mat A, Mat B, void* C, int64_t ldc,
          bool c_bf16, bool acc, More more = {});
