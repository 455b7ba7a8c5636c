// Ragged paged attention for CPUs, called by XLA through its foreign function interface.
//
// Compiled on the machine it runs on (../native_library.py), so vectors are the compiler's own vector types of 16 floats, which
// it maps to what the processor has. A work item is one tile (a decode is a tile of one token) and one key-value head.
// Keys are met in turns of TURN positions that start at multiples of TURN, each key is one lane, and each sum runs in
// the same order whatever the block size, the tile or the company: so the bits of a token's output depend on none of them.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int LANES = 16;
constexpr int TURN = 64;  // keys per turn of the online softmax
constexpr int ROWS = 4;   // query rows that share the registers
#if defined(__AVX512F__)
constexpr int VECTORS = 4;  // vectors of keys, or of a value, in registers per row
#else
constexpr int VECTORS = 1;  // 16 registers of 8 lanes or fewer hold no more
#endif
constexpr float MASKED = -1e30f;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint16_t HalfVec __attribute__((vector_size(32)));

inline Vec load(const float* from) {
  Vec out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

// bfloat16, kept as its bits: the upper half of a float32's
inline Vec load(const uint16_t* from) {
  HalfVec bits;
  std::memcpy(&bits, from, sizeof(bits));
  IntVec wide = __builtin_convertvector(bits, IntVec) << 16;
  Vec out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

inline Vec broadcast(float value) { return spread<Vec>(value, std::make_integer_sequence<int, LANES>{}); }

inline float widen(float value) { return value; }

inline float widen(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

// e^x for x <= 0 (Cody-Waite reduction, Taylor to degree 7); e^-87 for what is below, a NaN for a NaN.
inline Vec exponential(Vec x) {
  const Vec lowest = broadcast(-87.0f);
  x = x < lowest ? lowest : x;               // false for a NaN, which stays
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = x * 1.44269504088896341f + magic - magic;
  const Vec r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts
  Vec p = broadcast(1.0f / 5040.0f);
  for (float term : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) p = p * r + term;
  const IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

inline float exponential(float x) { return exponential(broadcast(x))[0]; }

// Scores of R rows and V vectors of keys: keys[v] + d * stride is element d of 16 keys.
template <int R, int V, typename K>
inline void score(const float* const* query, const K* const* keys, int64_t stride, int64_t head_dim, int first_vector,
                  float* const* scores) {
  Vec sums[R][V] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec key[V];
    for (int v = 0; v < V; ++v) key[v] = load(keys[first_vector + v] + d * stride);
    for (int r = 0; r < R; ++r) {
      const Vec element = broadcast(query[r][d]);
      for (int v = 0; v < V; ++v) sums[r][v] += element * key[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(scores[r] + (first_vector + v) * LANES, sums[r][v]);
}

// weighted[r] = weighted[r] * shrink[r] + sum over keys of weights[r][key] * values[key], elements d to d + V * LANES.
template <int R, int V, typename U>
inline void weigh(const float* const* weights, const U* const* values, int first, int last, const float* shrink,
                  int64_t d, float* const* weighted) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = load(weighted[r] + d + v * LANES) * shrink[r];
  for (int key = first; key < last; ++key) {
    Vec value[V];
    for (int v = 0; v < V; ++v) value[v] = load(values[key] + d + v * LANES);
    for (int r = 0; r < R; ++r) {
      const Vec weight = broadcast(weights[r][key]);
      for (int v = 0; v < V; ++v) sums[r][v] += weight * value[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(weighted[r] + d + v * LANES, sums[r][v]);
}

struct Shapes {
  int64_t num_q_heads, num_kv_heads, head_dim, block_size, blocks_per_seq, num_blocks;
  int64_t window;   // 0: none
  float soft_cap;   // 0: none
  bool has_sinks;
  int64_t group() const { return num_q_heads / num_kv_heads; }
  int64_t padded_dim() const { return (head_dim + LANES - 1) / LANES * LANES; }
};

template <typename T>
struct Cache {
  const T* keys;    // [blocks, kv_heads, head_dim, block_size]
  const T* values;  // [blocks, kv_heads, block_size, head_dim]
};

struct Tile {
  const int32_t* table;            // of its sequence
  int64_t first_position, length;  // of its tokens
};

// What one thread needs beside its registers, kept between calls.
struct Scratch {
  std::vector<float> weighted, highest, total, scores, keys, values;
};

// TURN keys as the inner loops read them; only those from `first` to `last` are there.
template <typename K, typename U>
struct Turn {
  int64_t position;  // of key 0
  int first, last;
  const K* keys[TURN / LANES];
  int64_t stride;
  const U* values[TURN];
};

// Brings all rows of a tile (rows are token after token, query heads of the key-value head within) past a turn's keys.
template <typename K, typename U>
void take(const Shapes& shapes, const Tile& tile, const Turn<K, U>& turn, const float* query, Scratch& scratch) {
  const int64_t group = shapes.group(), padded = shapes.padded_dim(), num_rows = tile.length * group;
  const int num_vectors = (turn.last + LANES - 1) / LANES;
  auto position = [&](int64_t row) { return tile.first_position + row / group; };
  for (int64_t row = 0; row < num_rows; row += ROWS) {
    const int used = static_cast<int>(std::min<int64_t>(ROWS, num_rows - row));
    if (position(row + used - 1) < turn.position) continue;
    if (shapes.window && position(row) - shapes.window >= turn.position + turn.last - 1) continue;
    const float* queries[ROWS];
    float *scores[ROWS], *weighted[ROWS], shrink[ROWS];
    for (int r = 0; r < used; ++r) {
      queries[r] = query + ((row + r) / group * shapes.num_q_heads + (row + r) % group) * shapes.head_dim;
      scores[r] = scratch.scores.data() + r * TURN;
      weighted[r] = scratch.weighted.data() + (row + r) * padded;
    }
    for (int v = 0; v < num_vectors; v += VECTORS) switch (used) {
        case 1: score<1, VECTORS>(queries, turn.keys, turn.stride, shapes.head_dim, v, scores); break;
        case 2: score<2, VECTORS>(queries, turn.keys, turn.stride, shapes.head_dim, v, scores); break;
        case 3: score<3, VECTORS>(queries, turn.keys, turn.stride, shapes.head_dim, v, scores); break;
        default: score<4, VECTORS>(queries, turn.keys, turn.stride, shapes.head_dim, v, scores);
      }
    for (int r = 0; r < used; ++r) {
      const int64_t at = position(row + r) - turn.position;
      const int64_t lowest = shapes.window ? at - shapes.window + 1 : 0;
      const int from = static_cast<int>(std::min<int64_t>(std::max<int64_t>(lowest, turn.first), TURN));
      const int to = static_cast<int>(std::max<int64_t>(std::min<int64_t>(at + 1, turn.last), from));
      if (shapes.soft_cap > 0.0f)
        for (int key = from; key < to; ++key)
          scores[r][key] = shapes.soft_cap * __builtin_tanhf(scores[r][key] / shapes.soft_cap);
      const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      auto is_seen = [&](int v) { return (lane + v * LANES >= from) & (lane + v * LANES < to); };
      Vec top = broadcast(MASKED);
      for (int v = 0; v < num_vectors; ++v) {
        const Vec seen = is_seen(v) ? load(scores[r] + v * LANES) : broadcast(MASKED);
        top = seen > top ? seen : top;
      }
      const float before = scratch.highest[row + r];
      float highest = before;
      for (int i = 0; i < LANES; ++i) highest = top[i] > highest ? top[i] : highest;
      shrink[r] = before == highest ? 1.0f : exponential(before - highest);
      Vec sum = {};
      for (int v = 0; v < num_vectors; ++v) {
        const Vec weight = is_seen(v) ? exponential(load(scores[r] + v * LANES) - highest) : Vec{};
        store(scores[r] + v * LANES, weight);
        sum += weight;
      }
      float total = 0.0f;
      for (int i = 0; i < LANES; ++i) total += sum[i];
      scratch.highest[row + r] = highest;
      scratch.total[row + r] = scratch.total[row + r] * shrink[r] + total;
    }
    auto weigh_rows = [&](auto rows, auto vectors, int64_t d) {
      weigh<rows(), vectors()>(scores, turn.values, turn.first, turn.last, shrink, d, weighted);
    };
    auto weigh_vectors = [&](auto vectors, int64_t d) {
      switch (used) {
        case 1: weigh_rows(std::integral_constant<int, 1>{}, vectors, d); break;
        case 2: weigh_rows(std::integral_constant<int, 2>{}, vectors, d); break;
        case 3: weigh_rows(std::integral_constant<int, 3>{}, vectors, d); break;
        default: weigh_rows(std::integral_constant<int, 4>{}, vectors, d);
      }
    };
    int64_t d = 0;
    for (; d + VECTORS * LANES <= padded; d += VECTORS * LANES) weigh_vectors(std::integral_constant<int, VECTORS>{}, d);
    for (; d < padded; d += LANES) weigh_vectors(std::integral_constant<int, 1>{}, d);
  }
}

// One tile and one key-value head. query and output point at the tile's first token and the head's first query head.
template <typename T>
void attend(const Shapes& shapes, const Cache<T>& cache, const Tile& tile, int64_t head, const float* query,
            const float* sinks, float* output, Scratch& scratch) {
  const int64_t dim = shapes.head_dim, padded = shapes.padded_dim(), block_size = shapes.block_size;
  const int64_t group = shapes.group(), num_rows = tile.length * group;
  const int64_t end = tile.first_position + tile.length;
  const int64_t begin = shapes.window ? std::max<int64_t>(tile.first_position - shapes.window + 1, 0) : 0;
  const bool packs_keys = block_size < LANES, packs_values = padded != dim;
  scratch.weighted.assign(num_rows * padded, 0.0f);
  scratch.highest.assign(num_rows, MASKED);
  scratch.total.assign(num_rows, 0.0f);
  scratch.scores.resize(ROWS * TURN);

  auto slab = [&](int64_t position) {  // where the head's part of a position's block begins
    int64_t block = tile.table[position / block_size];
    block = block < 0 || block >= shapes.num_blocks ? 0 : block;
    return (block * shapes.num_kv_heads + head) * dim * block_size;
  };
  for (int64_t position = begin / TURN * TURN; position < end; position += TURN) {
    Turn<T, T> turn = {position, static_cast<int>(std::max<int64_t>(begin - position, 0)),
                       static_cast<int>(std::min<int64_t>(end - position, TURN)), {}, block_size, {}};
    for (int key = turn.first; key < turn.last; ++key)
      turn.values[key] = cache.values + slab(position + key) + (position + key) % block_size * dim;
    for (int v = 0; v < TURN / LANES && !packs_keys; ++v) {
      // a vector before the first key or behind the last repeats one that is there; it will be masked
      const int key = std::clamp(v * LANES, turn.first / LANES * LANES, (turn.last - 1) / LANES * LANES);
      turn.keys[v] = cache.keys + slab(position + key) + (position + key) % block_size;
    }
    // the next turn's blocks come nearer while this one is computed: they lie anywhere, so no prefetcher finds them
    for (int64_t at = position + TURN; at < std::min(position + 2 * TURN, end) && block_size <= TURN; at += block_size) {
      const char* keys = reinterpret_cast<const char*>(cache.keys + slab(at));
      const char* values = reinterpret_cast<const char*>(cache.values + slab(at));
      for (int64_t byte = 0; byte < block_size * dim * static_cast<int64_t>(sizeof(T)); byte += 64) {
        __builtin_prefetch(keys + byte, 0, 2);
        __builtin_prefetch(values + byte, 0, 2);
      }
    }
    Turn<float, float> packed = {position, turn.first, turn.last, {}, TURN, {}};
    if (packs_keys) {  // blocks of fewer keys than lanes, brought together as [head_dim, TURN]
      scratch.keys.assign(dim * TURN, 0.0f);
      for (int key = turn.first; key < turn.last; ++key) {
        const T* from = cache.keys + slab(position + key) + (position + key) % block_size;
        for (int64_t d = 0; d < dim; ++d) scratch.keys[d * TURN + key] = widen(from[d * block_size]);
      }
      for (int v = 0; v < TURN / LANES; ++v) packed.keys[v] = scratch.keys.data() + v * LANES;
    }
    if (packs_values) {  // values that do not fill their last vector
      scratch.values.assign(TURN * padded, 0.0f);
      for (int key = turn.first; key < turn.last; ++key) {
        float* to = scratch.values.data() + key * padded;
        for (int64_t d = 0; d < dim; ++d) to[d] = widen(turn.values[key][d]);
        packed.values[key] = to;
      }
    }
    auto take_both = [&](const auto& keys, const auto& values) {
      Turn<std::decay_t<decltype(*keys.keys[0])>, std::decay_t<decltype(*values.values[0])>> mixed = {
          position, turn.first, turn.last, {}, keys.stride, {}};
      std::copy(std::begin(keys.keys), std::end(keys.keys), mixed.keys);
      std::copy(std::begin(values.values), std::end(values.values), mixed.values);
      take(shapes, tile, mixed, query, scratch);
    };
    if (packs_keys && packs_values) take(shapes, tile, packed, query, scratch);
    else if (packs_keys) take_both(packed, turn);
    else if (packs_values) take_both(turn, packed);
    else take(shapes, tile, turn, query, scratch);
  }

  for (int64_t row = 0; row < num_rows; ++row) {
    float total = scratch.total[row], scale = 1.0f;
    if (shapes.has_sinks) {
      const float sink = sinks[head * group + row % group];
      const float common = std::max(scratch.highest[row], sink);
      scale = exponential(scratch.highest[row] - common);
      total = total * scale + exponential(sink - common);
    }
    scale /= total == 0.0f ? 1.0f : total;
    const float* from = scratch.weighted.data() + row * padded;
    float* to = output + (row / group * shapes.num_q_heads + row % group) * dim;
    for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * scale;
  }
}

using Ids = ffi::Buffer<ffi::S32>;

template <typename T, ffi::DataType kStored>
ffi::Error run(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> query, ffi::Buffer<kStored> keys,
               ffi::Buffer<kStored> values, Ids block_tables, Ids context_lens, Ids query_starts, Ids num_decodes,
               Ids tile_sequences, Ids tile_starts, Ids tile_lens, Ids num_tiles, ffi::Buffer<ffi::F32> sinks,
               ffi::Result<ffi::Buffer<ffi::F32>> output, int64_t window, float soft_cap) {
  const auto q = query.dimensions(), k = keys.dimensions();
  if (q.size() != 3 || k.size() != 4 || k[2] != q[2] || q[1] % k[1] || values.element_count() != keys.element_count())
    return ffi::Error::InvalidArgument("query must be [tokens, q_heads, head_dim], keys [blocks, kv_heads, head_dim, "
                                       "block_size] and values [blocks, kv_heads, block_size, head_dim]");
  const Shapes shapes = {q[1],   k[1],   q[2],     k[3],
                         block_tables.dimensions()[1], k[0], window, soft_cap, sinks.element_count() > 0};
  const Cache<T> cache = {reinterpret_cast<const T*>(keys.untyped_data()),
                          reinterpret_cast<const T*>(values.untyped_data())};
  const float *queries = query.typed_data(), *sink_scores = sinks.typed_data();
  float* outputs = output->typed_data();
  std::memset(outputs, 0, sizeof(float) * output->element_count());  // rows of padding tokens are 0
  const int32_t *tables = block_tables.typed_data(), *contexts = context_lens.typed_data();
  const int32_t *starts = query_starts.typed_data(), *sequences = tile_sequences.typed_data();
  const int32_t *first_tokens = tile_starts.typed_data(), *lengths = tile_lens.typed_data();
  const int64_t tiles = num_tiles.typed_data()[0], decodes = num_decodes.typed_data()[0];
  const int64_t heads = shapes.num_kv_heads;

  parallel_for(threads, (tiles + decodes) * heads, [=](int64_t item) {
    static thread_local Scratch scratch;
    const int64_t index = item / heads, head = item % heads;
    int64_t sequence, token;
    Tile tile;
    if (index < tiles) {  // they take longer, so they go first
      sequence = sequences[index], token = first_tokens[index], tile.length = lengths[index];
      tile.first_position = contexts[sequence] - starts[sequence + 1] + token;
    } else {
      sequence = token = index - tiles, tile.length = contexts[sequence] > 0 ? 1 : 0;
      tile.first_position = contexts[sequence] - 1;
    }
    tile.table = tables + sequence * shapes.blocks_per_seq;
    const int64_t offset = (token * shapes.num_q_heads + head * shapes.group()) * shapes.head_dim;
    if (tile.length) attend(shapes, cache, tile, head, queries + offset, sink_scores, outputs + offset, scratch);
  });
  return ffi::Error::Success();
}

template <ffi::DataType kStored>
auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .template Arg<ffi::Buffer<kStored>>()
      .template Arg<ffi::Buffer<kStored>>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<Ids>()
      .template Arg<ffi::Buffer<ffi::F32>>()
      .template Ret<ffi::Buffer<ffi::F32>>()
      .template Attr<int64_t>("window")
      .template Attr<float>("soft_cap");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention_float32, (run<float, ffi::F32>), binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention_bfloat16, (run<uint16_t, ffi::U16>), binding<ffi::U16>());
