// Products of a few tokens with weights where they lie, and the threads that share them; see layers.cc.
#pragma once
#include "few.h"
#include "gemm.h"

namespace {

constexpr int64_t MOST = 16;  // tokens

// ---------------------------------------------------------------- threads

// Threads that stay for one call. Those that come late, or never, are not waited for.
class Team {
  struct State {
    std::atomic<uint64_t> ticket{0};  // part << 40 | its tasks << 20 | the next of them
    std::atomic<int64_t> done{0};
    std::function<void(int64_t)> task;
  };
  static constexpr uint64_t OVER = ~0ull;
  std::shared_ptr<State> s = std::make_shared<State>();
  uint64_t part = 0;

  static bool take(State& s) {
    uint64_t t = s.ticket.load(std::memory_order_acquire);
    if (t == OVER || (t & 0xfffff) >= (t >> 20 & 0xfffff)) return false;
    if (!s.ticket.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel)) return true;
    s.task(t & 0xfffff);  // the part cannot end before this one is done
    s.done.fetch_add(1, std::memory_order_release);
    return true;
  }

 public:
  explicit Team(ffi::ThreadPool& pool) {
    for (int64_t i = 1; i < std::max<int64_t>(1, pool.num_threads()); i++)
      pool.Schedule([s = s] {
        AmxScope amx;
        for (int spin = 0; s->ticket.load(std::memory_order_acquire) != OVER;) {
          if (take(*s)) spin = 0;
          else if (++spin > 20000) sched_yield();
          else _mm_pause();
        }
      });
  }
  ~Team() { s->ticket.store(OVER, std::memory_order_release); }

  template <typename F>
  void run(int64_t n, const F& f) {
    if (n == 1) return f(0);
    s->done.store(0, std::memory_order_relaxed);
    s->task = f;
    s->ticket.store(++part << 40 | (uint64_t)n << 20, std::memory_order_release);
    while (s->ticket.load(std::memory_order_relaxed) << 44 < (uint64_t)n << 44) take(*s);
    for (int spin = 0; s->done.load(std::memory_order_acquire) < n;)
      if (++spin > 4096) sched_yield();
      else _mm_pause();
  }
};

// ---------------------------------------------------------------- products

// What a product reads: M rows of float32 [M, ld], zeros past the end; for the tile unit also bfloat16.
struct Input {
  int64_t M, ld = 0;  // ld: a multiple of 32
  bool round = false, tiles = false;
  Scratch rows_, narrow_, pairs_, sums_;
  float *rows, *sums;    // sums [group, 16]: of the inputs of a group, for zero points
  bf16 *narrow, *pairs;  // rows [16, ld]; and for codes pairs of inputs [ld / 2, 16 tokens, 2]

  void shape(const Matrix& w) {
    ld = std::max<int64_t>(w.K, (w.I + 31) / 32 * 32);
    rows = rows_.get<float>(MOST * ld);
    narrow = narrow_.get<bf16>(MOST * ld);
    pairs = pairs_.get<bf16>(MOST * ld);
    sums = sums_.get<float>(ld);
  }
  // Row m is complete: what is past the end becomes zero, and all is rounded.
  void finish(int64_t m, const Matrix& w) {
    float* x = rows + m * ld;
    for (int64_t k = w.I / 16 * 16; k < ld; k += 16) _mm512_storeu_ps(x + k, _mm512_maskz_loadu_ps(first(w.I - k), x + k));
    if (!round) return;
    for (int64_t k = 0; k < ld; k += 16) {
      const __m256i v = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k));
      _mm512_storeu_ps(x + k, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)));
      _mm256_storeu_si256((__m256i*)(narrow + m * ld + k), v);
    }
  }
  // All rows are finished: lays them out for the weights w.
  void pack(const Matrix& w) {
    if (!tiles || w.kind < BYTES) return;
    for (int64_t k = 0; k < ld; k += 32) {
      __m512i r[16];
      for (int64_t m = 0; m < 16; m++) r[m] = m < M ? _mm512_loadu_si512(narrow + m * ld + k) : _mm512_setzero_si512();
      transpose16(r);
      for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(pairs + k * 16 + i * 32, r[i]);
    }
    if (!w.zeros) return;
    for (int64_t m = 0; m < M; m++)
      for (int64_t g = 0; g * w.group < ld; g++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = g * w.group; k < std::min(ld, (g + 1) * w.group); k += 16)
          sum = _mm512_add_ps(sum, _mm512_loadu_ps(rows + m * ld + k));
        sums[g * 16 + m] = _mm512_reduce_add_ps(sum);
      }
  }
};

// Rows [m0, m0 + R) of y, 64 columns from n on.
template <int R, typename T, bool Round>
void dense_few(const Matrix& w, const Input& x, int64_t m0, float* y, int64_t n) {
  const T* p = (const T*)w.values + n;
  __m512 sum[R][4];
  for (int m = 0; m < R; m++)
    for (int c = 0; c < 4; c++) sum[m][c] = _mm512_setzero_ps();
  __mmask16 mask[4];
  for (int c = 0; c < 4; c++) mask[c] = first(w.O - n - 16 * c);
  const float* in = x.rows + m0 * x.ld;
  for (int64_t k = 0; k < w.I; k++, p += w.O) {
    for (size_t b = 0; b < 64 * sizeof(T); b += 64) _mm_prefetch((const char*)(p + 12 * w.O) + b, _MM_HINT_T0);
    __m512 v[4];
    for (int c = 0; c < 4; c++) {
      v[c] = load16(p + 16 * c, mask[c]);
      if (Round) v[c] = rounded(v[c]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < R; m++) {
      const __m512 a = _mm512_set1_ps(in[m * x.ld + k]);
      for (int c = 0; c < 4; c++) sum[m][c] = _mm512_fmadd_ps(a, v[c], sum[m][c]);
    }
  }
  for (int m = 0; m < R; m++)
    for (int c = 0; c < 4; c++) _mm512_mask_storeu_ps(y + (m0 + m) * w.O + n + 16 * c, mask[c], sum[m][c]);
}

template <typename T, bool Round>
void dense(const Matrix& w, const Input& x, float* y, int64_t n) {
  int64_t m = 0;
  for (; m + 4 <= x.M; m += 4) dense_few<4, T, Round>(w, x, m, y, n);
  for (; m + 2 <= x.M; m += 2) dense_few<2, T, Round>(w, x, m, y, n);
  for (; m < x.M; m++) dense_few<1, T, Round>(w, x, m, y, n);
}

#ifdef HAVE_AMX
// 64 columns of y from n on: rows of inputs are one operand, weights become the pairs of rows that the other one is.
template <typename T>
void dense_tiles(const Matrix& w, const Input& x, float* y, int64_t n) {
  alignas(64) bf16 t[4][512];
  alignas(64) float out[4][256];
  const T* p = (const T*)w.values + n;
  const __mmask32 mask[2] = {first32(w.O - n), first32(w.O - n - 32)};
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < w.I; k += 32) {
    for (int i = 0; i < 16; i++) {
      const int64_t r = k + 2 * i;
      const T* q = p + r * w.O;
      for (size_t b = 0; b < 64 * sizeof(T); b += 64) {
        _mm_prefetch((const char*)(q + 16 * w.O) + b, _MM_HINT_T0);
        _mm_prefetch((const char*)(q + 17 * w.O) + b, _MM_HINT_T0);
      }
      for (int h = 0; h < 2; h++) {
        __m512i pair[2];
        const __m512i z = _mm512_setzero_si512();
        pairs32(r < w.I ? row32(q + 32 * h, mask[h]) : z, r + 1 < w.I ? row32(q + w.O + 32 * h, mask[h]) : z, pair);
        _mm512_store_si512(t[2 * h] + i * 32, pair[0]);
        _mm512_store_si512(t[2 * h + 1] + i * 32, pair[1]);
      }
    }
    asm volatile("" ::: "memory");
    _tile_loadd(4, x.narrow + k, x.ld * 2);
    _tile_loadd(5, t[0], 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, t[1], 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, t[2], 64);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, t[3], 64);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, out[0], 64);
  _tile_stored(1, out[1], 64);
  _tile_stored(2, out[2], 64);
  _tile_stored(3, out[3], 64);
  asm volatile("" ::: "memory");
  for (int64_t m = 0; m < x.M; m++)
    for (int c = 0; c < 4; c++)
      _mm512_mask_storeu_ps(y + m * w.O + n + 16 * c, first(w.O - n - 16 * c), _mm512_load_ps(out[c] + m * 16));
}

// 16 columns of y from f on: codes are one operand as they lie, pairs of inputs the other. A piece of each row after
// the other becomes tiles, so that memory is read in order; two sums take turns, since one has to wait for itself.
template <bool Packed>
void codes_tiles(const Matrix& w, const Input& x, float* y, int64_t f) {
  constexpr int64_t PIECE = 768;  // inputs
  alignas(64) static thread_local bf16 own[PIECE / 32][512];
  bf16(*const t)[512] = own;
  alignas(64) float out[2][256];
  const int64_t features = std::min<int64_t>(16, w.O - f), row = Packed ? w.K / 2 : w.K;
  const uint8_t* p = w.values + f * row;
  const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(Packed ? w.table : x.rows)));
  const __m512i low = _mm512_set1_epi16(15);
  __m512 total[16];
  for (int i = 0; i < 16; i++) total[i] = _mm512_setzero_ps();
  _tile_zero(0);
  _tile_zero(1);
  const auto close = [&](int64_t g) {  // scales of a group, once for all its codes
    _tile_stored(0, out[0], 64);
    _tile_stored(1, out[1], 64);
    asm volatile("" ::: "memory");
    const __m512 xs = w.zeros ? _mm512_loadu_ps(x.sums + g * 16) : _mm512_setzero_ps();
    const float *scale = w.scales + g * w.O + f, *zero = w.zeros ? w.zeros + g * w.O + f : nullptr;
    for (int64_t i = 0; i < features; i++) {
      __m512 v = _mm512_add_ps(_mm512_load_ps(out[0] + i * 16), _mm512_load_ps(out[1] + i * 16));
      if (zero) v = _mm512_fnmadd_ps(_mm512_set1_ps(zero[i]), xs, v);
      total[i] = _mm512_fmadd_ps(_mm512_set1_ps(scale[i]), v, total[i]);
    }
    _tile_zero(0);
    _tile_zero(1);
  };
  int64_t begun = 0;  // the group of what the sums hold
  for (int64_t k0 = 0; k0 < w.I; k0 += PIECE) {
    const int64_t end = std::min(w.I, k0 + PIECE);
    for (int64_t i = 0; i < features; i++) {
      const uint8_t* q = p + i * row;
      if (Packed) {
        for (int64_t block = k0; block < end; block += 256)
          for (int64_t j = 0; j < 128 && block + j < end; j += 32) {
            const uint8_t* at = q + block / 2 + j;
            if (j % 64 == 0) _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
            const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)at));
            bf16* tile = t[(block - k0 + j) / 32] + i * 32;
            _mm512_store_si512(tile, _mm512_permutexvar_epi16(_mm512_and_si512(both, low), table));
            _mm512_store_si512(tile + 4 * 512, _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table));
          }
      } else {
        for (int64_t k = k0; k < end; k += 32) {
          if (k % 64 == 0) _mm_prefetch((const char*)q + k + AHEAD, _MM_HINT_T0);
          _mm512_store_si512(t[(k - k0) / 32] + i * 32, row32((const int8_t*)q + k, ~0u));
        }
      }
    }
    asm volatile("" ::: "memory");
    for (int64_t k = k0; k < end;) {
      const int64_t stop = std::min(end, (k / w.group + 1) * w.group);
      if (k / w.group != begun) close(begun), begun = k / w.group;
      for (; k < stop; k += 32) {
        if (k & 32) {
          _tile_loadd(4, t[(k - k0) / 32], 64);
          _tile_loadd(5, x.pairs + k * 16, 64);
          _tile_dpbf16ps(0, 4, 5);
        } else {
          _tile_loadd(6, t[(k - k0) / 32], 64);
          _tile_loadd(7, x.pairs + k * 16, 64);
          _tile_dpbf16ps(1, 6, 7);
        }
      }
    }
  }
  close(begun);
  __m512i turned[16];
  for (int i = 0; i < 16; i++) turned[i] = _mm512_castps_si512(total[i]);
  transpose16(turned);
  for (int64_t m = 0; m < x.M; m++)
    _mm512_mask_storeu_ps(y + m * w.O + f, first(features), _mm512_castsi512_ps(turned[m]));
}
#endif

// Columns of a task: as many as one of the functions above takes, and of codes some more.
int64_t width(const Matrix& w) { return w.kind == BYTES || w.kind == NIBBLES ? 32 : 64; }
int64_t tasks(const Matrix& w) { return (w.O + width(w) - 1) / width(w); }

void product(const Matrix& w, const Input& x, float* y, int64_t task) {
  const int64_t n = task * width(w);
#ifdef HAVE_AMX
  if (x.tiles) {
    if (w.kind == BFLOAT16) return dense_tiles<bf16>(w, x, y, n);
    if (w.kind == FLOAT32) return dense_tiles<float>(w, x, y, n);
    for (int64_t f = n; f < std::min(w.O, n + 32); f += 16)
      w.kind == NIBBLES ? codes_tiles<true>(w, x, y, f) : codes_tiles<false>(w, x, y, f);
    return;
  }
#endif
  if (w.kind == BFLOAT16) dense<bf16, false>(w, x, y, n);
  else if (w.kind == FLOAT32) x.round ? dense<float, true>(w, x, y, n) : dense<float, false>(w, x, y, n);
  else quantized_few(w, x.M, x.round, x.rows, y, n, std::min(w.O, n + width(w)));
}

}  // namespace
