// Attention of a few queries to a long cache, in one piece or in pages: decoding, where the time is that of reading the
// keys and values once.
//
// A tile is R rows (query heads of one key head, times new tokens) of one sequence. A task is a tile's key head and 256
// keys: sixteen keys at a time are turned into [H, 16], so that scores of sixteen keys are one vector and no sum runs
// across lanes; then the rows' sums of values. Where operands may be rounded to bfloat16 (`round`), the tile unit
// multiplies 16 rows and more. Tasks leave (sums, largest score, sum of exponentials), and a second round
// adds them up in order, so that the result does not depend on who computed what (Flash-Decoding).
#include <optional>

#include "decode_tiles.h"
#include "few.h"

namespace {

// [16 keys, H] to [H, 16]; keys past n are zeros.
template <typename T>
void turn(const T* keys, const int64_t* at, int64_t n, int64_t H, float* out) {
  for (int64_t h = 0; h < H; h += 16) {
    __m512i r[16];
    for (int64_t i = 0; i < 16; i++) r[i] = i < n ? _mm512_castps_si512(load16(keys + at[i] + h)) : _mm512_setzero_si512();
    transpose16(r);
    for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(out + (h + i) * 16, r[i]);
  }
}

// Scores of sixteen keys for N rows: out[r * CHUNK + 0..15].
template <int N>
void scores(const float* q, const float* keys, int64_t H, float* out) {
  __m512 sum[N];
  for (int i = 0; i < N; i++) sum[i] = _mm512_setzero_ps();
  for (int64_t h = 0; h < H; h++) {
    __m512 k = _mm512_loadu_ps(keys + h * 16);
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(q[i * H + h]), k, sum[i]);
  }
  for (int i = 0; i < N; i++) _mm512_storeu_ps(out + i * CHUNK, sum[i]);
}

// acc[r] += sum over n keys of p[r] value, for N rows and 64 numbers from h on (`masks`: those inside H).
template <int N, typename T>
void values(const float* p, const T* v, const int64_t* at, int64_t n, int64_t H, int64_t h, float* acc) {
  const int64_t parts = std::min<int64_t>(4, (H - h) / 16);
  __m512 sum[N][4];
  for (int i = 0; i < N; i++)
    for (int64_t c = 0; c < parts; c++) sum[i][c] = _mm512_loadu_ps(acc + i * H + h + c * 16);
  if (parts == 4) {
    for (int64_t s = 0; s < n; s++) {
      const T* row = v + at[s] + h;
      __m512 x[4] = {load16(row), load16(row + 16), load16(row + 32), load16(row + 48)};
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        __m512 weight = _mm512_set1_ps(p[i * CHUNK + s]);
        for (int c = 0; c < 4; c++) sum[i][c] = _mm512_fmadd_ps(weight, x[c], sum[i][c]);
      }
    }
  } else {
    for (int64_t s = 0; s < n; s++)
      for (int64_t c = 0; c < parts; c++) {
        __m512 x = load16(v + at[s] + h + c * 16);
        for (int i = 0; i < N; i++) sum[i][c] = _mm512_fmadd_ps(_mm512_set1_ps(p[i * CHUNK + s]), x, sum[i][c]);
      }
  }
  for (int i = 0; i < N; i++)
    for (int64_t c = 0; c < parts; c++) _mm512_storeu_ps(acc + i * H + h + c * 16, sum[i][c]);
}

template <typename T>
void fetch(const T* x, const int64_t* at, int64_t n, int64_t H) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t h = 0; h < H; h += 64 / (int64_t)sizeof(T)) _mm_prefetch((const char*)(x + at[i] + h), _MM_HINT_T0);
}

}  // namespace

template <typename T>
void attend_part(const Cache& c, const float* q, const T* keys, const T* vals, int64_t m, int64_t k, int64_t s0,
                 int64_t s1, float* acc) {
  static thread_local Scratch turned_, p_, rounded_, sums_;
  const int64_t H = c.H, R = c.R, n = s1 - s0, rows = (R + 15) / 16 * 16;
  float *top = acc + R * H, *total = top + R;
  const bool tiles = c.round && tiles_pay(R, H);
  float *turned = turned_.get<float>(std::max<int64_t>(16 * H, 16 * CHUNK)), *p = p_.get<float>(rows * CHUNK);
  bf16* rounded = rounded_.get<bf16>(rows * std::max(H, CHUNK));
  std::optional<AmxScope> amx;  // a caller's own would end with a second one
  if (tiles) amx.emplace(), round_rows(q, H, R, H, rounded, H);
  int64_t at[CHUNK + 16], scale_at[CHUNK + 16];
  for (int64_t s = 0; s < n; s += 16) c.places(m, k, s0 + s, std::min<int64_t>(16, n - s), at + s, scale_at + s);
  const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t s = 0; s < n; s += 16) {
    const int64_t here = std::min<int64_t>(16, n - s);
    if (s + 16 < n) fetch(keys, at + s + 16, std::min<int64_t>(16, n - s - 16), H);
    int64_t r = 0;
    if (tiles) {
      tile_scores(rounded, R, keys, at + s, here, H, (bf16*)turned, p + s, CHUNK);
    } else {
      turn(keys, at + s, here, H, turned);
      for (; r + 4 <= R; r += 4) scores<4>(q + r * H, turned, H, p + r * CHUNK + s);
      for (; r < R; r++) scores<1>(q + r * H, turned, H, p + r * CHUNK + s);
    }
    __m512 factor = _mm512_set1_ps(c.scale);
    if (c.key_scales)
      for (int i = 0; i < here; i++)
        factor = _mm512_mask_mul_ps(factor, 1 << i, factor, _mm512_set1_ps(c.key_scales[scale_at[s + i]]));
    for (r = 0; r < R; r++) {
      float* row = p + r * CHUNK + s;
      const int64_t position = c.position[m] + r / c.group;
      __m512 z = _mm512_mul_ps(_mm512_loadu_ps(row), factor);
      if (c.softcap > 0) {  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        __m512 e = exp16(_mm512_min_ps(_mm512_mul_ps(z, _mm512_set1_ps(2 / c.softcap)), _mm512_set1_ps(80.f)));
        __m512 t = _mm512_div_ps(_mm512_set1_ps(2.f), _mm512_add_ps(e, _mm512_set1_ps(1.f)));
        z = _mm512_mul_ps(_mm512_set1_ps(c.softcap), _mm512_sub_ps(_mm512_set1_ps(1.f), t));
      }
      if (c.slopes) {
        __m512 distance = _mm512_sub_ps(_mm512_set1_ps((float)(position - s0 - s)), lanes);
        z = _mm512_fnmadd_ps(_mm512_set1_ps(c.slopes[k * c.group + r % c.group]), _mm512_abs_ps(distance), z);
      }
      __mmask16 seen = first(here);
      if (c.causal) seen &= first(position + 1 - s0 - s);
      if (c.window > 0) seen &= ~first(position - c.window + 1 - s0 - s);
      _mm512_storeu_ps(row, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, z));
    }
  }
  const int64_t padded = (n + 15) / 16 * 16;
  for (int64_t r = 0; r < R; r++) {
    float* row = p + r * CHUNK;
    __m512 high = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < padded; s += 16) high = _mm512_max_ps(high, _mm512_loadu_ps(row + s));
    top[r] = _mm512_reduce_max_ps(high);
    const __m512 t = _mm512_set1_ps(top[r] == -INFINITY ? 0 : top[r]);
    for (int64_t s = 0; s < padded; s += 16) {
      __m512 z = _mm512_loadu_ps(row + s);
      __mmask16 seen = _mm512_cmp_ps_mask(z, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
      z = _mm512_maskz_mov_ps(seen, exp16(_mm512_sub_ps(z, t)));
      sum = _mm512_add_ps(sum, z);
      _mm512_storeu_ps(row + s, z);
    }
    total[r] = _mm512_reduce_add_ps(sum);
    if (c.value_scales)
      for (int64_t s = 0; s < n; s++) row[s] *= c.value_scales[scale_at[s]];
  }
  if (tiles) {
    float* sums = sums_.get<float>(rows * H);
    round_rows(p, CHUNK, R, n, rounded, CHUNK);
    tile_values(rounded, CHUNK, R, vals, at, n, H, (bf16*)turned, sums);
    memcpy(acc, sums, R * H * sizeof(float));
    return;
  }
  memset(acc, 0, R * H * sizeof(float));
  for (int64_t s = 0; s < n; s += 32) {
    const int64_t here = std::min<int64_t>(32, n - s);
    if (s + 32 < n) fetch(vals, at + s + 32, std::min<int64_t>(32, n - s - 32), H);
    for (int64_t h = 0; h < H; h += 64) {
      int64_t r = 0;
      for (; r + 4 <= R; r += 4) values<4>(p + r * CHUNK + s, vals, at + s, here, H, h, acc + r * H);
      for (; r < R; r++) values<1>(p + r * CHUNK + s, vals, at + s, here, H, h, acc + r * H);
    }
  }
}

template void attend_part(const Cache&, const float*, const float*, const float*, int64_t, int64_t, int64_t, int64_t,
                          float*);
template void attend_part(const Cache&, const float*, const bf16*, const bf16*, int64_t, int64_t, int64_t, int64_t,
                          float*);

template <typename T>
static void attend(ffi::ThreadPool& pool, const Cache& c, const float* q, const void* keys, const void* vals, int64_t M,
            float* out, float* lse) {
  static thread_local Scratch parts_;
  const int64_t K = c.K, R = c.R, H = c.H, size = R * (H + 2);
  // Chunks begin at multiples of CHUNK, wherever a window does: a row's sums are the same in any tile.
  const auto chunk_of = [&](int64_t m, int64_t i) { return c.first_key(m) / CHUNK * CHUNK + i * CHUNK; };
  int64_t chunks = 1;
  for (int64_t m = 0; m < M; m++) chunks = std::max(chunks, (c.end[m] - chunk_of(m, 0) + CHUNK - 1) / CHUNK);
  float* parts = parts_.get<float>(M * chunks * K * size);
  const auto keys_of = [&](int64_t m, int64_t i) { return std::max(c.first_key(m), chunk_of(m, i)); };
  parallel_for(pool, (int)(M * chunks * K), [&](int task) {
    const int64_t k = task % K, i = task / K % chunks, m = task / K / chunks, s0 = keys_of(m, i);
    if (s0 >= c.end[m]) return;
    attend_part(c, q + (m * K + k) * R * H, (const T*)keys, (const T*)vals, m, k, s0,
                std::min<int64_t>(c.end[m], chunk_of(m, i) + CHUNK), parts + task * size);
  });
  parallel_for(pool, (int)M, [&](int m) {
    for (int64_t row = 0; row < K * R; row++) {
      const int64_t k = row / R, r = row % R, at = m * K * R + row;
      const auto part = [&](int64_t i) { return parts + ((m * chunks + i) * K + k) * size; };
      int64_t n = 0;
      while (n < chunks && keys_of(m, n) < c.end[m]) n++;
      lse[at] = combine(part, n, r, R, H, out + at * H);
    }
  });
}

// q [M, K, R, H] float32; keys, values [B, S, K, H], or with `paged` [pages, K, page_size, H]; table [B, max_pages].
static ffi::Error DecodeImpl(ffi::ThreadPool pool, Floats q, Any keys, Any values, Floats key_scales,
                             Floats value_scales, Ints table, Ints sequence, Ints position, Ints end, Floats slopes,
                             FloatsOut out, FloatsOut lse, bool paged, bool causal, int64_t group, int64_t window,
                             float scale, float softcap, bool round) {
  const auto d = keys.dimensions();
  const int64_t M = q.dimensions()[0], K = q.dimensions()[1], R = q.dimensions()[2], H = q.dimensions()[3];
  if (H % 16 || d[3] != H || d[paged ? 1 : 2] != K) return ffi::Error::InvalidArgument("decode: shapes disagree");
  const int64_t size = paged ? d[2] : d[1];
  Cache c{K, H, R, group, size, table.dimensions()[1], size * K * H, paged ? size * H : H, paged ? H : K * H,
          table.typed_data(), sequence.typed_data(), position.typed_data(), end.typed_data(), causal, window, scale,
          softcap, nullptr, given(key_scales), given(value_scales), given(slopes), round};
  auto run = [&](auto type) {
    attend<decltype(type)>(pool, c, q.typed_data(), keys.untyped_data(), values.untyped_data(), M, out->typed_data(),
                           lse->typed_data());
  };
  switch (keys.element_type()) {
    case ffi::F32: run(float()); break;
    case ffi::BF16: run(bf16()); break;
    case ffi::S8: run(int8_t()); break;
    default: return ffi::Error::InvalidArgument("decode: float32, bfloat16 and int8 only");
  }
  return ffi::Error::Success();
}

HANDLER(cpu_decode, DecodeImpl, "paged", "causal", "group", "window", "scale", "softcap", "round");

// ---------------------------------------------------------------- in the order of a cache, without one

// Queries [B, T, N, H] to keys and values [B, S, K, H] of the same tokens or of a cache, in tiles as above: the results
// are those that the same tokens have when they are read in any parts from a cache. Packed documents (`segments`,
// [B, T]; 0 is padding) are tiles of their own, whose keys begin where the document does.
static ffi::Error InOrderImpl(ffi::ThreadPool pool, Floats q, Any keys, Any values, Ints segments, Ints offset,
                              Floats slopes, FloatsOut out, FloatsOut lse, bool causal, int64_t window, float scale,
                              float softcap) {
  static thread_local Scratch queries_, out_, lse_;
  const auto d = q.dimensions();
  const int64_t B = d[0], T = d[1], N = d[2], H = d[3], S = keys.dimensions()[1], K = keys.dimensions()[2], G = N / K;
  const int64_t tokens = std::max<int64_t>(1, std::min<int64_t>(16, 64 / G)), R = tokens * G;
  std::vector<int32_t> table(B), row, first_token, count, position, end, start;
  const auto tiles = [&](int64_t b, int64_t t0, int64_t t1, int64_t begin, int64_t at, int64_t length) {
    for (int64_t t = t0; t < t1; t += tokens) {
      const int64_t n = std::min(tokens, t1 - t), here = at + t - t0;
      row.push_back(b), first_token.push_back(t), count.push_back(n), position.push_back(here), start.push_back(begin);
      end.push_back(causal ? std::min(here + n, length) : length);
    }
  };
  for (int64_t b = 0; b < B; b++) {
    table[b] = b;
    if (!segments.element_count()) {
      tiles(b, 0, T, 0, offset.element_count() ? offset.typed_data()[b] : 0, S);
      continue;
    }
    const int32_t* ids = segments.typed_data() + b * T;
    std::vector<int32_t> seen;
    for (int64_t t = 0, next; t < T; t = next) {
      for (next = t; next < T && ids[next] == ids[t]; next++) {}
      if (ids[t] == 0) continue;
      seen.push_back(ids[t]);
      tiles(b, t, next, t, 0, next - t);
    }
    std::sort(seen.begin(), seen.end());
    if (std::adjacent_find(seen.begin(), seen.end()) != seen.end())
      return ffi::Error::InvalidArgument("batch-invariant attention: the tokens of a segment must stand together");
  }
  float *o = out->typed_data(), *l = lse->typed_data();
  memset(o, 0, B * T * N * H * sizeof(float));
  std::fill(l, l + B * N * T, -INFINITY);
  const int64_t all = (int64_t)row.size(), together = 32;
  float *queries = queries_.get<float>(together * K * R * H), *tile_out = out_.get<float>(together * K * R * H);
  float* tile_lse = lse_.get<float>(together * K * R);
  for (int64_t m0 = 0; m0 < all; m0 += together) {
    const int64_t M = std::min(together, all - m0);
    // use(whether it is a query, its place in the arrays of tiles, row, token, head) for all rows of a tile
    const auto rows = [&](int64_t m, const auto& use) {
      for (int64_t k = 0; k < K; k++)
        for (int64_t r = 0; r < R; r++) {
          const int64_t i = r / G, t = first_token[m0 + m] + i, n = k * G + r % G;
          use(i < count[m0 + m], (m * K + k) * R + r, row[m0 + m], t, n);
        }
    };
    for (int64_t m = 0; m < M; m++)
      rows(m, [&](bool real, int64_t at, int64_t b, int64_t t, int64_t n) {
        if (real) memcpy(queries + at * H, q.typed_data() + ((b * T + t) * N + n) * H, H * sizeof(float));
        else memset(queries + at * H, 0, H * sizeof(float));
      });
    Cache c{K, H, R, G, S, 1, S * K * H, H, K * H, table.data(), row.data() + m0, position.data() + m0,
            end.data() + m0, causal, window, scale, softcap, start.data() + m0, nullptr, nullptr, given(slopes)};
    const auto run = [&](auto type) {
      attend<decltype(type)>(pool, c, queries, keys.untyped_data(), values.untyped_data(), M, tile_out, tile_lse);
    };
    keys.element_type() == ffi::BF16 ? run(bf16()) : run(float());
    for (int64_t m = 0; m < M; m++)
      rows(m, [&](bool real, int64_t at, int64_t b, int64_t t, int64_t n) {
        if (!real) return;
        memcpy(o + ((b * T + t) * N + n) * H, tile_out + at * H, H * sizeof(float));
        l[(b * N + n) * T + t] = tile_lse[at];
      });
  }
  return ffi::Error::Success();
}

HANDLER(cpu_attention_in_order, InOrderImpl, "causal", "window", "scale", "softcap");
