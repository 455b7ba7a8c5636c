// Ragged paged attention for CPUs, called by XLA through its foreign function interface. New keys and values are written
// into the cache first, in place.
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
constexpr int64_t ITEMS_PER_THREAD = 8;
constexpr int64_t MIN_WRITTEN = 4096;  // elements; fewer are not worth another thread's start
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

// All lanes combined by halves: always the same pairs, so always the same bits.
template <typename Combine>
inline float fold(Vec value, Combine combine) {
  float lanes[LANES];
  store(lanes, value);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}

// TURN keys of one key-value head where they lie; only those from `first` to `last` are there, the others repeat them.
template <typename T>
struct Turn {
  int64_t position;  // of key 0
  int first, last;
  const T* keys[TURN / LANES];  // element d of LANES keys is at + d * stride
  int64_t stride;
  const T* values[TURN];
};

// Scores of R rows and V vectors of keys. With FETCH, the same vectors of `coming` are fetched meanwhile.
template <int R, int V, bool FETCH, typename K, typename T>
inline void score(const float* const* query, const Turn<K>& turn, const Turn<T>* coming, int64_t head_dim,
                  int first_vector, float* const* scores) {
  Vec sums[R][V] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec key[V];
    for (int v = 0; v < V; ++v) {
      key[v] = load(turn.keys[first_vector + v] + d * turn.stride);
      if (FETCH) __builtin_prefetch(coming->keys[first_vector + v] + d * coming->stride, 0, 2);
    }
    for (int r = 0; r < R; ++r) {
      const Vec element = broadcast(query[r][d]);
      for (int v = 0; v < V; ++v) sums[r][v] += element * key[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(scores[r] + (first_vector + v) * LANES, sums[r][v]);
}

// weighted[r] = weighted[r] * shrink[r] + sum over keys of weights[r][key] * values[key], elements d to d + V * LANES.
template <int R, int V, bool FETCH, typename U, typename T>
inline void weigh(const float* const* weights, const Turn<U>& turn, const Turn<T>* coming, const float* shrink,
                  int64_t d, float* const* weighted) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = load(weighted[r] + d + v * LANES) * shrink[r];
  for (int key = turn.first; key < turn.last; ++key) {
    Vec value[V];
    for (int v = 0; v < V; ++v) {
      value[v] = load(turn.values[key] + d + v * LANES);
      if (FETCH) __builtin_prefetch(coming->values[key] + d + v * LANES, 0, 2);
    }
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
  T* keys;    // [blocks, kv_heads, head_dim, block_size]
  T* values;  // [blocks, kv_heads, block_size, head_dim]
};

// Keys and values [tokens, kv_heads, head_dim] of a step's tokens, and the slots that they go to.
template <typename T>
struct Fresh {
  const T *keys, *values;
  const int32_t* slots;
  int64_t tokens;
};

struct Tile {
  const int32_t* table;            // of its sequence
  int64_t first_position, length;  // of its tokens
  int64_t end() const { return first_position + length; }
  int64_t begin(const Shapes& shapes) const {  // the first key that any of them sees
    return shapes.window ? std::max<int64_t>(first_position - shapes.window + 1, 0) : 0;
  }
};

// What one thread needs beside its registers, kept between calls.
struct Scratch {
  std::vector<float> weighted, highest, total, scores, keys, values;
};

// Calls work with the number of rows and whether to fetch as constants.
template <typename Work>
inline void for_rows(int rows, bool fetches, Work work) {
  auto with = [&](auto constant) {
    if (fetches) work(constant, std::true_type{});
    else work(constant, std::false_type{});
  };
  switch (rows) {
    case 1: return with(std::integral_constant<int, 1>{});
    case 2: return with(std::integral_constant<int, 2>{});
    case 3: return with(std::integral_constant<int, 3>{});
    default: return with(std::integral_constant<int, ROWS>{});
  }
}

// Brings all rows of a tile (rows are token after token, query heads of the key-value head within) past a turn's keys
// and values, which are of one turn, and fetches `coming` meanwhile, if that is not null.
template <typename K, typename U, typename T>
void take(const Shapes& shapes, const Tile& tile, const Turn<K>& turn, const Turn<U>& values, const Turn<T>* coming,
          const float* query, Scratch& scratch) {
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
    const Turn<T>* fetched = coming;  // by the first rows
    coming = nullptr;
    for_rows(used, fetched != nullptr, [&](auto rows, auto fetch) {
      for (int v = 0; v < num_vectors; v += VECTORS)
        score<rows(), VECTORS, fetch()>(queries, turn, fetched, shapes.head_dim, v, scores);
    });
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
      const float highest = std::max(before, fold(top, [](float a, float b) { return a > b ? a : b; }));
      shrink[r] = before == highest ? 1.0f : exponential(before - highest);
      Vec sum = {};
      for (int v = 0; v < num_vectors; ++v) {
        const Vec weight = is_seen(v) ? exponential(load(scores[r] + v * LANES) - highest) : Vec{};
        store(scores[r] + v * LANES, weight);
        sum += weight;
      }
      scratch.highest[row + r] = highest;
      scratch.total[row + r] = scratch.total[row + r] * shrink[r] + fold(sum, [](float a, float b) { return a + b; });
    }
    for_rows(used, fetched != nullptr, [&](auto rows, auto fetch) {
      int64_t d = 0;
      for (; d + VECTORS * LANES <= padded; d += VECTORS * LANES)
        weigh<rows(), VECTORS, fetch()>(scores, values, fetched, shrink, d, weighted);
      for (; d < padded; d += LANES) weigh<rows(), 1, fetch()>(scores, values, fetched, shrink, d, weighted);
    });
  }
}

// Where a head's part of a sequence's block begins, for keys and for values.
inline int64_t slab(const Shapes& shapes, const Tile& tile, int64_t head, int64_t index) {
  int64_t block = tile.table[index];
  block = block < 0 || block >= shapes.num_blocks ? 0 : block;
  return (block * shapes.num_kv_heads + head) * shapes.head_dim * shapes.block_size;
}

// Puts a head's new keys and values into their slots; what is outside the cache is dropped.
template <typename T>
void write(const Shapes& shapes, const Cache<T>& cache, const Fresh<T>& fresh, int64_t head) {
  const int64_t dim = shapes.head_dim, block_size = shapes.block_size;
  const int64_t stride = shapes.num_kv_heads * dim;  // from token to token
  for (int64_t token = 0, run = 1; token < fresh.tokens; token += run, run = 1) {
    const int64_t slot = fresh.slots[token];
    if (slot < 0 || slot >= shapes.num_blocks * block_size) continue;
    const int64_t block = slot / block_size, offset = slot % block_size;
    // tokens side by side in a block are written element by element, so that stores are side by side too
    while (offset + run < block_size && token + run < fresh.tokens && fresh.slots[token + run] == slot + run) ++run;
    const int64_t to = (block * shapes.num_kv_heads + head) * dim * block_size;
    const T* key = fresh.keys + token * stride + head * dim;
    const T* value = fresh.values + token * stride + head * dim;
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t i = 0; i < run; ++i) cache.keys[to + d * block_size + offset + i] = key[i * stride + d];
    for (int64_t i = 0; i < run; ++i) std::copy_n(value + i * stride, dim, cache.values + to + (offset + i) * dim);
  }
}

// The keys and values of a head, from the sequence's first that somebody sees; block by block, as a division a key is slow.
template <typename T>
Turn<T> find_turn(const Shapes& shapes, const Cache<T>& cache, const Tile& tile, int64_t head, int64_t position) {
  const int64_t dim = shapes.head_dim, block_size = shapes.block_size;
  Turn<T> turn;
  turn.position = position;
  turn.first = static_cast<int>(std::max<int64_t>(tile.begin(shapes) - position, 0));
  turn.last = static_cast<int>(std::min<int64_t>(tile.end() - position, TURN));
  turn.stride = block_size;
  int64_t index = (position + turn.first) / block_size, offset = (position + turn.first) % block_size;
  const T* values = cache.values + slab(shapes, tile, head, index) + offset * dim;
  std::fill(turn.values, turn.values + turn.first, values);
  for (int key = turn.first; key < turn.last; ++key, ++offset) {
    if (offset == block_size) values = cache.values + slab(shapes, tile, head, ++index), offset = 0;
    turn.values[key] = values;
    values += dim;
  }
  std::fill(turn.values + turn.last, turn.values + TURN, turn.values[turn.last - 1]);
  for (int v = 0; v < TURN / LANES; ++v) {
    // a vector before the first key or behind the last repeats one that is there; it will be masked
    const int key = std::clamp(v * LANES, turn.first / LANES * LANES, (turn.last - 1) / LANES * LANES);
    turn.keys[v] = cache.keys + slab(shapes, tile, head, (position + key) / block_size) + (position + key) % block_size;
  }
  return turn;
}

// One tile and one key-value head. query and output point at the tile's first token and the head's first query head;
// `turn` is the head's first, and becomes that of the next head, if there is one.
template <typename T>
void attend(const Shapes& shapes, const Cache<T>& cache, const Tile& tile, int64_t head, bool has_next, Turn<T>& turn,
            const float* query, const float* sinks, float* output, Scratch& scratch) {
  const int64_t dim = shapes.head_dim, padded = shapes.padded_dim(), block_size = shapes.block_size;
  const int64_t group = shapes.group(), num_rows = tile.length * group;
  const bool packs_keys = block_size < LANES, packs_values = padded != dim;
  scratch.weighted.assign(num_rows * padded, 0.0f);
  scratch.highest.assign(num_rows, MASKED);
  scratch.total.assign(num_rows, 0.0f);
  scratch.scores.resize(ROWS * TURN);

  for (bool is_last = false; !is_last;) {
    Turn<T> coming;
    is_last = turn.position + TURN >= tile.end();
    if (!is_last) coming = find_turn(shapes, cache, tile, head, turn.position + TURN);
    else if (has_next) coming = find_turn(shapes, cache, tile, head + 1, tile.begin(shapes) / TURN * TURN);
    // what comes is fetched while this turn is computed: blocks lie anywhere, so no prefetcher finds them
    const Turn<T>* fetched = is_last && !has_next ? nullptr : &coming;
    Turn<float> packed = {turn.position, turn.first, turn.last, {}, TURN, {}};
    if (packs_keys) {  // blocks of fewer keys than lanes, brought together as [head_dim, TURN]
      scratch.keys.assign(dim * TURN, 0.0f);
      for (int key = turn.first; key < turn.last; ++key) {
        const int64_t index = (turn.position + key) / block_size;
        const T* from = cache.keys + slab(shapes, tile, head, index) + (turn.position + key) % block_size;
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
    if (packs_keys && packs_values) take(shapes, tile, packed, packed, fetched, query, scratch);
    else if (packs_keys) take(shapes, tile, packed, turn, fetched, query, scratch);
    else if (packs_values) take(shapes, tile, turn, packed, fetched, query, scratch);
    else take(shapes, tile, turn, turn, fetched, query, scratch);
    if (fetched) turn = coming;
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
ffi::Error run(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> query, ffi::Buffer<kStored> key,
               ffi::Buffer<kStored> value, ffi::Buffer<kStored> keys, ffi::Buffer<kStored> values, Ids slot_mapping,
               Ids block_tables, Ids context_lens, Ids query_starts, Ids num_decodes, Ids tile_sequences,
               Ids tile_starts, Ids tile_lens, Ids num_tiles, ffi::Buffer<ffi::F32> sinks,
               ffi::Result<ffi::Buffer<ffi::F32>> output, ffi::Result<ffi::Buffer<kStored>> keys_out,
               ffi::Result<ffi::Buffer<kStored>> values_out, int64_t window, float soft_cap) {
  const auto q = query.dimensions(), k = keys.dimensions();
  const int64_t tokens = slot_mapping.element_count();
  if (q.size() != 3 || k.size() != 4 || k[2] != q[2] || q[1] % k[1] || values.element_count() != keys.element_count())
    return ffi::Error::InvalidArgument("query must be [tokens, q_heads, head_dim], keys [blocks, kv_heads, head_dim, "
                                       "block_size] and values [blocks, kv_heads, block_size, head_dim]");
  if (key.element_count() != tokens * k[1] * k[2] || value.element_count() != key.element_count())
    return ffi::Error::InvalidArgument("key and value must be [tokens, kv_heads, head_dim], slot_mapping [tokens]");
  if (keys_out->untyped_data() != keys.untyped_data() || values_out->untyped_data() != values.untyped_data())
    return ffi::Error::Internal("the cache is written in place, but XLA gave another buffer for the result");
  const Shapes shapes = {q[1],   k[1],   q[2],     k[3],
                         block_tables.dimensions()[1], k[0], window, soft_cap, sinks.element_count() > 0};
  const Cache<T> cache = {reinterpret_cast<T*>(keys_out->untyped_data()),
                          reinterpret_cast<T*>(values_out->untyped_data())};
  const Fresh<T> fresh = {reinterpret_cast<const T*>(key.untyped_data()),
                          reinterpret_cast<const T*>(value.untyped_data()), slot_mapping.typed_data(), tokens};
  const float *queries = query.typed_data(), *sink_scores = sinks.typed_data();
  float* outputs = output->typed_data();
  std::memset(outputs, 0, sizeof(float) * output->element_count());  // rows of padding tokens are 0
  const int32_t *tables = block_tables.typed_data(), *contexts = context_lens.typed_data();
  const int32_t *starts = query_starts.typed_data(), *sequences = tile_sequences.typed_data();
  const int32_t *first_tokens = tile_starts.typed_data(), *lengths = tile_lens.typed_data();
  const int64_t tiles = num_tiles.typed_data()[0], decodes = num_decodes.typed_data()[0];
  const int64_t heads = shapes.num_kv_heads;

  // a thread has a head, as padding tokens share a slot; all is written before any is read
  if (tokens * shapes.head_dim * heads < MIN_WRITTEN)
    for (int64_t head = 0; head < heads; ++head) write(shapes, cache, fresh, head);
  else
    parallel_for(threads, heads, [=](int64_t head) { write(shapes, cache, fresh, head); });

  // an item goes on from head to head, as what comes is known then; where items are few, a head is one
  const int64_t heads_per_item = tiles + decodes >= ITEMS_PER_THREAD * threads.num_threads() ? heads : 1;
  const int64_t items_per_tile = heads / heads_per_item;
  parallel_for(threads, (tiles + decodes) * items_per_tile, [=](int64_t item) {
    static thread_local Scratch scratch;
    const int64_t index = item / items_per_tile, first_head = item % items_per_tile * heads_per_item;
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
    if (!tile.length) return;
    Turn<T> turn = find_turn(shapes, cache, tile, first_head, tile.begin(shapes) / TURN * TURN);
    for (int64_t head = first_head; head < first_head + heads_per_item; ++head) {
      const int64_t offset = (token * shapes.num_q_heads + head * shapes.group()) * shapes.head_dim;
      const bool has_next = head + 1 < first_head + heads_per_item;
      attend(shapes, cache, tile, head, has_next, turn, queries + offset, sink_scores, outputs + offset, scratch);
    }
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
      .template Arg<Ids>()
      .template Arg<ffi::Buffer<ffi::F32>>()
      .template Ret<ffi::Buffer<ffi::F32>>()
      .template Ret<ffi::Buffer<kStored>>()
      .template Ret<ffi::Buffer<kStored>>()
      .template Attr<int64_t>("window")
      .template Attr<float>("soft_cap");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention_float32, (run<float, ffi::F32>), binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention_bfloat16, (run<uint16_t, ffi::U16>), binding<ffi::U16>());
