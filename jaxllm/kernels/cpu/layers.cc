// One call for all layers of a Llama and a few tokens: decoding, where the time is that of reading the weights once.
//
// As separate operations, seven products a layer and what lies between, a step of a small model is mostly the waking of
// threads. Here they are woken once, and go from part to part together. Activations stay in float32; with bfloat16
// ones, what enters a product is rounded. Weights are read where they lie: dense ones [I, O], codes [O, K]. From
// three tokens of bfloat16 on the tile unit multiplies (where there is one): one tile of 16 tokens, weights turned into
// tiles of bfloat16 in the first-level cache, which holds codes exactly, and scales applied to sums.
#include "few.h"
#include "gemm.h"

namespace {

constexpr int64_t MOST = 16;  // tokens
constexpr int64_t AHEAD = 2048;  // bytes of codes that are asked for early: rows lie one after the other

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

__m512 rounded(__m512 v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16));
}

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

// 32 codes as bfloat16, from bytes or from halves of them.
inline __m512i of_bytes(const uint8_t* p) {
  const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
  return (__m512i)_mm512_cvtne2ps_pbh(b, a);
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
          _mm512_store_si512(t[(k - k0) / 32] + i * 32, of_bytes(q + k));
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
  else quantized_few(w, x.M, x.rows, y, n, std::min(w.O, n + width(w)));
}

// ---------------------------------------------------------------- layers

struct Layer {
  const float *attention_norm, *mlp_norm;
  Matrix query, key, value, output, gate, up, down;
  const void *keys, *values;  // pages
  void *new_keys, *new_values;
};

struct Step {
  int64_t N, D, heads, F, pages;
  bool round;
  float eps;
  Paged paged;
  const float *cos, *sin;
};

// y = x / rms(x) * w
void norm(const float* x, const float* w, float eps, int64_t D, float* y) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < D; i += 16) {
    const __m512 v = load16(x + i, first(D - i));
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const __m512 r = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(sum) / D + eps));
  for (int64_t i = 0; i < D; i += 16) {
    const __mmask16 m = first(D - i);
    store16(y + i, _mm512_mul_ps(_mm512_mul_ps(load16(x + i, m), r), load16(w + i, m)), m);
  }
}

void rotate(float* x, const float* cos, const float* sin, int64_t H) {
  const int64_t h = H / 2;
  for (int64_t i = 0; i < h; i += 16) {
    const __mmask16 m = first(h - i);
    const __m512 a = load16(x + i, m), b = load16(x + h + i, m), c = load16(cos + i, m), s = load16(sin + i, m);
    store16(x + i, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)), m);
    store16(x + h + i, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)), m);
  }
}

template <typename T>
void write(const Step& s, const float* x, int64_t m, T* pages) {
  const Paged& p = s.paged;
  const int64_t at = p.position[m], index = at / p.page_size;
  if (at < 0 || index >= p.max_pages) return;
  const int64_t page = p.table[p.sequence[m] * p.max_pages + index];
  if (page < 0 || page >= s.pages) return;
  for (int64_t k = 0; k < p.K; k++)
    for (int64_t h = 0; h < p.H; h += 16)
      store16(pages + ((page * p.K + k) * p.page_size + at % p.page_size) * p.H + h, _mm512_loadu_ps(x + k * p.H + h));
}

void run(ffi::ThreadPool& pool, const Step& s, const std::vector<Layer>& layers, float* x) {
  static thread_local Scratch q_, k_, v_, h_, a_, b_, parts_;
  static thread_local Input inputs[3];
  Input &in = inputs[0], &mixed = inputs[1], &inner = inputs[2];  // this thread's, for all
  const int64_t N = s.N, D = s.D, K = s.paged.K, H = s.paged.H, R = s.paged.R, Q = s.heads * H, F = s.F;
  AmxScope amx;
  Team team(pool);
  in.M = mixed.M = inner.M = N;
  in.round = mixed.round = inner.round = s.round;
  in.tiles = mixed.tiles = inner.tiles = amx_ok && s.round && N > 2;
  float *q = q_.get<float>(N * Q), *k = k_.get<float>(N * K * H), *v = v_.get<float>(N * K * H);
  float *h = h_.get<float>(N * D), *a = a_.get<float>(N * F), *b = b_.get<float>(N * F);
  int64_t longest = 0;
  for (int64_t m = 0; m < N; m++) longest = std::max<int64_t>(longest, s.paged.position[m] + 1);
  const int64_t chunks = (longest + DECODE_CHUNK - 1) / DECODE_CHUNK, size = R * (H + 2);
  float* parts = parts_.get<float>(std::max<int64_t>(1, N * K * chunks * size));
  const auto each = [&](const auto& f) {  // token, by all where there are some
    if (N >= 4) return team.run(N, f);
    for (int64_t m = 0; m < N; m++) f(m);
  };
  // x += what a product has added, if any; then the norm of it is what the next ones read.
  const auto normed = [&](const float* more, const float* scale, const Matrix& w) {
    in.shape(w);
    each([&](int64_t m) {
      float* row = x + m * D;
      if (more)
        for (int64_t i = 0; i < D; i += 16) {
          const __mmask16 mask = first(D - i);
          store16(row + i, _mm512_add_ps(load16(row + i, mask), load16(more + m * D + i, mask)), mask);
        }
      norm(row, scale, s.eps, D, in.rows + m * in.ld);
      in.finish(m, w);
    });
    in.pack(w);
  };
  bool any = false;
  for (const Layer& l : layers) {
    normed(any ? h : nullptr, l.attention_norm, l.query);
    any = true;
    const int64_t nq = tasks(l.query), nk = tasks(l.key), nv = tasks(l.value);
    team.run(nq + nk + nv, [&](int64_t i) {
      if (i < nq) product(l.query, in, q, i);
      else if (i < nq + nk) product(l.key, in, k, i - nq);
      else product(l.value, in, v, i - nq - nk);
    });
    Paged p = s.paged;
    p.keys = l.new_keys, p.values = l.new_values;
    each([&](int64_t m) {
      const float *c = s.cos + m * H / 2, *si = s.sin + m * H / 2;
      for (int64_t i = 0; i < s.heads; i++) rotate(q + m * Q + i * H, c, si, H);
      for (int64_t i = 0; i < K; i++) rotate(k + (m * K + i) * H, c, si, H);
      if (p.is_bf16) write(s, k + m * K * H, m, (bf16*)l.new_keys), write(s, v + m * K * H, m, (bf16*)l.new_values);
      else write(s, k + m * K * H, m, (float*)l.new_keys), write(s, v + m * K * H, m, (float*)l.new_values);
    });
    team.run(N * K * chunks, [&](int64_t i) {
      const int64_t head = i % K, m = i / K % N, s0 = i / K / N * DECODE_CHUNK, end = p.position[m] + 1;
      if (s0 >= end) return;
      float *acc = parts + i * size, *top = acc + R * H;
      decode_part(p, q + m * Q + head * R * H, m, head, s0, std::min(end, s0 + DECODE_CHUNK), acc, top, top + R);
    });
    mixed.shape(l.output);
    each([&](int64_t m) {
      for (int64_t n = 0; n < s.heads; n++) {
        const int64_t head = n / R, r = n % R, end = p.position[m] + 1;
        const auto part = [&](int64_t i) { return parts + ((i * N + m) * K + head) * size; };
        float top = -INFINITY, total = 0, *o = mixed.rows + m * mixed.ld + n * H;
        for (int64_t i = 0; i * DECODE_CHUNK < end; i++) top = std::max(top, part(i)[R * H + r]);
        memset(o, 0, H * sizeof(float));
        if (top == -INFINITY) continue;
        for (int64_t i = 0; i * DECODE_CHUNK < end; i++)
          total += std::exp(part(i)[R * H + r] - top) * part(i)[R * H + R + r];
        for (int64_t i = 0; i * DECODE_CHUNK < end; i++) {
          const __m512 w = _mm512_set1_ps(std::exp(part(i)[R * H + r] - top) / total);
          for (int64_t j = 0; j < H; j += 16)
            _mm512_storeu_ps(o + j, _mm512_fmadd_ps(w, _mm512_loadu_ps(part(i) + r * H + j), _mm512_loadu_ps(o + j)));
        }
      }
      mixed.finish(m, l.output);
    });
    mixed.pack(l.output);
    team.run(tasks(l.output), [&](int64_t i) { product(l.output, mixed, h, i); });
    normed(h, l.mlp_norm, l.gate);
    inner.shape(l.down);
    team.run(tasks(l.gate), [&](int64_t i) {
      product(l.gate, in, a, i);
      product(l.up, in, b, i);
      const int64_t n0 = i * width(l.gate), n1 = std::min(F, n0 + width(l.gate));
      for (int64_t m = 0; m < N; m++)
        for (int64_t n = n0; n < n1; n += 16) {
          const __mmask16 mask = first(n1 - n);
          const __m512 g = load16(a + m * F + n, mask), e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), g));
          const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.f), e));
          store16(inner.rows + m * inner.ld + n, _mm512_mul_ps(silu, load16(b + m * F + n, mask)), mask);
        }
    });
    each([&](int64_t m) { inner.finish(m, l.down); });
    inner.pack(l.down);
    team.run(tasks(l.down), [&](int64_t i) { product(l.down, inner, h, i); });
  }
  for (int64_t i = 0; i < N * D; i++) x[i] += h[i];
}

// One of the fixed kinds of `jaxllm/kernels/cpu_layers.py`: packed codes by their table (int4, with zero points, nf4).
Matrix matrix(int64_t kind, int64_t inputs, int64_t group, ffi::AnyBuffer values, ffi::AnyBuffer scales,
              ffi::AnyBuffer zeros, const float* tables) {
  Matrix w{};
  const auto d = values.dimensions();
  w.values = (const uint8_t*)values.untyped_data();
  w.scales = (const float*)scales.untyped_data();
  w.zeros = zeros.element_count() ? (const float*)zeros.untyped_data() : nullptr;
  w.I = inputs;
  if (kind < BYTES) {
    w.kind = (Kind)kind, w.O = d[1], w.K = 0, w.group = 1;
  } else {
    w.kind = kind == BYTES ? BYTES : NIBBLES;
    w.O = d[0], w.K = d[1] * (w.kind == NIBBLES ? 2 : 1), w.group = std::min(group, w.K);
    w.table = tables + 16 * std::max<int64_t>(0, kind - NIBBLES);
  }
  return w;
}

ffi::Error Few(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values, ffi::AnyBuffer scales,
               ffi::AnyBuffer zeros, ffi::Buffer<ffi::F32> tables, ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t kind,
               int64_t group, bool round) {
  const int64_t M = x.dimensions()[0], I = x.dimensions()[1];
  if (M < 1 || M > MOST) return ffi::Error::InvalidArgument("few: too many tokens");
  static thread_local Input input;
  Input& in = input;
  const Matrix w = matrix(kind, I, group, values, scales, zeros, tables.typed_data());
  in.M = M, in.round = round, in.tiles = amx_ok && round && M > 2;
  in.shape(w);
  for (int64_t m = 0; m < M; m++) {
    memcpy(in.rows + m * in.ld, x.typed_data() + m * I, I * sizeof(float));
    in.finish(m, w);
  }
  in.pack(w);
  AmxScope amx;
  Team team(pool);
  float* out = y->typed_data();
  team.run(tasks(w), [&](int64_t i) { product(w, in, out, i); });
  return ffi::Error::Success();
}

// Arguments of a layer after one another: norm, norm, seven matrices in three arrays each, keys and values.
constexpr int64_t ARGUMENTS = 2 + 7 * 3 + 2;

ffi::Error Layers(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                  ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> sequence, ffi::Buffer<ffi::S32> position,
                  ffi::Buffer<ffi::F32> tables, ffi::RemainingArgs arguments, ffi::Result<ffi::Buffer<ffi::F32>> y,
                  ffi::RemainingRets results, ffi::Span<const int64_t> kinds, int64_t heads, int64_t inputs_of_down,
                  bool round, float eps, float scale) {
  const int64_t count = arguments.size() / ARGUMENTS, N = x.dimensions()[0], D = x.dimensions()[1];
  if (N < 1 || N > MOST || (int64_t)arguments.size() != count * ARGUMENTS || (int64_t)results.size() != 2 * count ||
      (int64_t)kinds.size() != 7 * 3 * count)
    return ffi::Error::InvalidArgument("layers: arguments disagree");
  std::vector<Layer> layers(count);
  Step s{N, D, heads, inputs_of_down, 0, round, eps, {}, cos.typed_data(), sin.typed_data()};
  for (int64_t i = 0; i < count; i++) {
    int64_t at = i * ARGUMENTS;
    const auto next = [&] { return *arguments.get<ffi::AnyBuffer>(at++); };
    Layer& l = layers[i];
    l.attention_norm = (const float*)next().untyped_data();
    l.mlp_norm = (const float*)next().untyped_data();
    Matrix* all[] = {&l.query, &l.key, &l.value, &l.output, &l.gate, &l.up, &l.down};
    for (int j = 0; j < 7; j++) {
      const int64_t* facts = kinds.begin() + (i * 7 + j) * 3;  // kind, inputs, group
      const auto values = next(), scales = next(), zeros = next();
      *all[j] = matrix(facts[0], facts[1], facts[2], values, scales, zeros, tables.typed_data());
    }
    const auto keys = next(), values = next();
    const auto d = keys.dimensions();
    l.new_keys = (*results.get<ffi::AnyBuffer>(2 * i))->untyped_data();
    l.new_values = (*results.get<ffi::AnyBuffer>(2 * i + 1))->untyped_data();
    if (l.new_keys != keys.untyped_data() || l.new_values != values.untyped_data())
      return ffi::Error::InvalidArgument("layers: pages are not written in place");
    s.pages = d[0];
    s.paged = {d[1], d[3], heads / d[1], d[2], table.dimensions()[1], table.typed_data(), sequence.typed_data(),
               position.typed_data(), nullptr, nullptr, keys.element_type() == ffi::BF16, scale};
  }
  memcpy(y->typed_data(), x.typed_data(), N * D * sizeof(float));
  run(pool, s, layers, y->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_layers, Layers,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::F32>>().RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>().RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("kinds").Attr<int64_t>("heads")
                                  .Attr<int64_t>("inner").Attr<bool>("round").Attr<float>("eps").Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(cpu_few, Few,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("kind").Attr<int64_t>("group")
                                  .Attr<bool>("round"));
