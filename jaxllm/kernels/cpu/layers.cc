// One call for all layers of a Llama and a few tokens: decoding, where the time is that of reading the weights once.
//
// As separate operations, seven products a layer and what lies between, a step of a small model is mostly the waking of
// threads. Here they are woken once, and go from part to part together. Activations stay in float32; with bfloat16
// ones, what enters a product is rounded. Weights are read where they lie: dense ones [I, O], codes [O, K]. From
// three tokens of bfloat16 on the tile unit multiplies (where there is one): one tile of 16 tokens, weights turned into
// tiles of bfloat16 in the first-level cache, which holds codes exactly, and scales applied to sums.
#include "few_products.h"
#include "rows.h"

namespace {

// ---------------------------------------------------------------- layers

struct Layer {
  const float *attention_norm, *mlp_norm;
  Matrix query, key, value, output, gate, up, down;
  void *keys, *values;  // pages
};

struct Step {
  int64_t N, D, heads, F, pages;
  bool round, pages_bf16;
  float eps;
  Cache cache;  // each token is a tile
  const float *cos, *sin;
};

template <typename T>
void write(const Step& s, const float* x, int64_t m, T* pages) {
  const Cache& p = s.cache;
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
  const int64_t N = s.N, D = s.D, K = s.cache.K, H = s.cache.H, R = s.cache.R, Q = s.heads * H, F = s.F;
  AmxScope amx;
  Team team(pool);
  in.M = mixed.M = inner.M = N;
  in.round = mixed.round = inner.round = s.round;
  in.tiles = mixed.tiles = inner.tiles = amx_ok && s.round && N > 2;
  float *q = q_.get<float>(N * Q), *k = k_.get<float>(N * K * H), *v = v_.get<float>(N * K * H);
  float *h = h_.get<float>(N * D), *a = a_.get<float>(N * F), *b = b_.get<float>(N * F);
  int64_t longest = 0;
  for (int64_t m = 0; m < N; m++) longest = std::max<int64_t>(longest, s.cache.position[m] + 1);
  const int64_t chunks = (longest + CHUNK - 1) / CHUNK, size = R * (H + 2);
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
      rms_norm_row(row, scale, s.eps, D, in.rows + m * in.ld);
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
    each([&](int64_t m) {
      const auto turn = [&](float* row) { rope_row(row, s.cos + m * H / 2, s.sin + m * H / 2, H, 1, row); };
      for (int64_t i = 0; i < s.heads; i++) turn(q + m * Q + i * H);
      for (int64_t i = 0; i < K; i++) turn(k + (m * K + i) * H);
      of_type(s.pages_bf16, [&](auto t) {
        write(s, k + m * K * H, m, (decltype(t)*)l.keys), write(s, v + m * K * H, m, (decltype(t)*)l.values);
      });
    });
    team.run(N * K * chunks, [&](int64_t i) {
      const int64_t head = i % K, m = i / K % N, s0 = i / K / N * CHUNK, end = s.cache.position[m] + 1;
      if (s0 >= end) return;
      of_type(s.pages_bf16, [&](auto t) {
        using T = const decltype(t);
        attend_part(s.cache, q + m * Q + head * R * H, (T*)l.keys, (T*)l.values, m, head, s0, std::min(end, s0 + CHUNK),
                    parts + i * size);
      });
    });
    mixed.shape(l.output);
    each([&](int64_t m) {
      for (int64_t n = 0; n < s.heads; n++) {
        const auto part = [&](int64_t i) { return parts + ((i * N + m) * K + n / R) * size; };
        const int64_t some = (s.cache.position[m] + CHUNK) / CHUNK;  // chunks with keys that it sees
        combine(part, some, n % R, R, H, mixed.rows + m * mixed.ld + n * H);
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
Matrix matrix(int64_t kind, int64_t inputs, int64_t group, Any values, Any scales, Any zeros, const float* tables) {
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

ffi::Error Few(ffi::ThreadPool pool, Floats x, Any values, Any scales, Any zeros, Floats tables, FloatsOut y,
               int64_t kind, int64_t group, bool round) {
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

ffi::Error Layers(ffi::ThreadPool pool, Floats x, Floats cos, Floats sin, Ints table, Ints sequence, Ints position,
                  Floats tables, ffi::RemainingArgs arguments, FloatsOut y, ffi::RemainingRets results,
                  ffi::Span<const int64_t> kinds, int64_t heads, int64_t inputs_of_down, bool round, float eps,
                  float scale) {
  const int64_t count = arguments.size() / ARGUMENTS, N = x.dimensions()[0], D = x.dimensions()[1];
  if (N < 1 || N > MOST || (int64_t)arguments.size() != count * ARGUMENTS || (int64_t)results.size() != 2 * count ||
      (int64_t)kinds.size() != 7 * 3 * count)
    return ffi::Error::InvalidArgument("layers: arguments disagree");
  std::vector<Layer> layers(count);
  Step s{N, D, heads, inputs_of_down, 0, round, false, eps, {}, cos.typed_data(), sin.typed_data()};
  for (int64_t i = 0; i < count; i++) {
    int64_t at = i * ARGUMENTS;
    const auto next = [&] { return *arguments.get<Any>(at++); };
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
    l.keys = (*results.get<Any>(2 * i))->untyped_data();
    l.values = (*results.get<Any>(2 * i + 1))->untyped_data();
    if (l.keys != keys.untyped_data() || l.values != values.untyped_data())
      return ffi::Error::InvalidArgument("layers: pages are not written in place");
    s.pages = d[0];
    s.pages_bf16 = keys.element_type() == ffi::BF16;
    Cache& c = s.cache;
    c.K = d[1], c.H = d[3], c.R = c.group = heads / d[1], c.page_size = d[2], c.max_pages = table.dimensions()[1];
    c.token = c.H, c.head = c.page_size * c.token, c.page = c.K * c.head, c.scale = scale;
    c.table = table.typed_data(), c.sequence = sequence.typed_data(), c.position = position.typed_data();
  }
  memcpy(y->typed_data(), x.typed_data(), N * D * sizeof(float));
  run(pool, s, layers, y->typed_data());
  return ffi::Error::Success();
}

}  // namespace

HANDLER(cpu_layers, Layers, "kinds", "heads", "inner", "round", "eps", "scale");
HANDLER(cpu_few, Few, "kind", "group", "round");
