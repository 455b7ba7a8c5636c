// inputs [rows, in] times the transpose of a kernel [out, in], both float32 or both bfloat16, the result float32, for
// CPUs, called by XLA through its foreign function interface. Compiled on the machine it runs on (../native_library.py),
// with the compiler's own vector types.
//
// Few rows are bound by the memory the kernel comes from, many by the multipliers, so there are two loops:
// - up to FEW rows: a lane holds every LANES-th product of one sum, GROUP rows and COLUMNS columns share the registers,
//   and the lanes are added at the end. The kernel is read as it lies.
// - more: a lane is a row. Inputs are brought into panels [in, rows], each element of the kernel is spread over a vector.
// Both fetch the columns that come next while they compute. Every sum runs in an order that depends on `in` and on which
// loop it is in, and on nothing else: neither on its row or column, nor on how many there are, nor on the threads.
//
// Both loops go by words of four bytes along `in`: a float32, or two bfloat16 whose products go to one sum.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "../native.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)  // 32 registers of 16
constexpr int LANES = 16;
constexpr int GROUP = 4, COLUMNS = 6;
constexpr int MAX_VECTORS = 4;           // of rows in a panel
constexpr int WIDTHS[] = {12, 8, 8, 6};  // columns that share the registers with 1, 2, 3, 4 vectors of rows
#else  // 16 registers of 8, or more of fewer
constexpr int LANES = 8;
constexpr int GROUP = 4, COLUMNS = 3;
constexpr int MAX_VECTORS = 2;
constexpr int WIDTHS[] = {8, 6};
#endif
constexpr int MAX_WIDTH = 12;
constexpr int64_t FEW = 4 * GROUP;
constexpr int64_t PANEL_ROWS = MAX_VECTORS * LANES;
constexpr int64_t DEPTH = 256;               // words of `in` summed at a time: shorter sums are more precise
constexpr int64_t MAX_ITEM_WORDS = 1 << 16;  // of the kernel, to stay in the second cache
constexpr int64_t COLUMNS_STEP = 24;         // a multiple of every width
constexpr int64_t ITEMS_PER_THREAD = 4;
constexpr int64_t MIN_ITEM_PRODUCTS = 1 << 15;  // of words; fewer are not worth another thread's start

constexpr int64_t WORD = 4;  // bytes

typedef float Vec __attribute__((vector_size(LANES * 4)));

inline Vec load(const void* from) {
  Vec out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

// Compilers else read a vector from memory for each product that it is in, and loads are what there is least of.
inline void keep_in_register(Vec& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__AVX__)
  asm("" : "+x"(value));
#endif
}

constexpr auto LANE = std::make_integer_sequence<int, LANES>{};

inline Vec broadcast(float value) { return spread<Vec>(value, LANE); }

// What is in a word. PARTS times, `part` makes floats of words, and `add` adds products of them to a sum.
struct Float32 {
  static constexpr int PARTS = 1;
  template <int>
  static Vec part(Vec words) { return words; }
  static void add(Vec& sum, Vec input, Vec weight) { sum += input * weight; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {  // one instruction for both products; denormal products are 0
  static constexpr int PARTS = 1;
  template <int>
  static Vec part(Vec words) { return words; }
  static void add(Vec& sum, Vec input, Vec weight) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)input, (__m512bh)weight);
  }
};
#else
struct BFloat16 {  // a bfloat16 is the upper half of a float
  static constexpr int PARTS = 2;
  template <int PART>
  static Vec part(Vec words) {
    typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
    Bits bits;
    std::memcpy(&bits, &words, sizeof(bits));
    bits = PART == 0 ? bits << 16 : bits & 0xFFFF0000u;
    std::memcpy(&words, &bits, sizeof(bits));
    return words;
  }
  static void add(Vec& sum, Vec input, Vec weight) { sum += input * weight; }
};
#endif

// Of two rows of a square: lanes whose bit HALF is 0 come to `low` from both, the others to `high`, a's first.
template <int HALF, int... I>
inline void exchange(Vec a, Vec b, Vec& low, Vec& high, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, ((I & HALF) ? LANES + I - HALF : I)...);
  high = __builtin_shufflevector(a, b, ((I & HALF) ? LANES + I : I + HALF)...);
#else
  typedef int32_t Index __attribute__((vector_size(LANES * 4)));
  low = __builtin_shuffle(a, b, Index{((I & HALF) ? LANES + I - HALF : I)...});
  high = __builtin_shuffle(a, b, Index{((I & HALF) ? LANES + I : I + HALF)...});
#endif
}

// Transposes a square of LANES vectors.
template <int HALF = 1>
inline void transpose(Vec* square) {
  for (int i = 0; i < LANES; ++i)
    if (!(i & HALF)) exchange<HALF>(square[i], square[i + HALF], square[i], square[i + HALF], LANE);
  if constexpr (HALF * 2 < LANES) transpose<HALF * 2>(square);
}

// Element i of the result is the sum of the lanes of vectors[i].
template <int HALF = 1>
inline Vec add_lanes(const Vec* vectors) {
  constexpr int REST = LANES / HALF;  // vectors that come in
  Vec halves[REST / 2];
  for (int i = 0; i < REST / 2; ++i) {
    Vec low, high;
    exchange<HALF>(vectors[2 * i], vectors[2 * i + 1], low, high, LANE);
    halves[i] = low + high;
  }
  if constexpr (REST == 2) return halves[0];
  else return add_lanes<HALF * 2>(halves);
}

// Floats that begin with a cache line, kept between calls.
struct Scratch {
  std::vector<float> floats;
  float* resize(int64_t size) {
    constexpr int64_t LINE = 64;
    floats.resize(size + LINE / sizeof(float));
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(floats.data()) + LINE - 1) / LINE * LINE);
  }
};

struct Problem {
  const char *inputs, *kernel;
  float* outputs;
  int64_t rows, out_dim, row_bytes;  // of inputs and of the kernel

  int64_t words() const { return (row_bytes + WORD - 1) / WORD; }  // the last may be half a one
  const char* input(int64_t row) const { return inputs + row * row_bytes; }
  const char* column(int64_t index) const { return kernel + std::min(index, out_dim - 1) * row_bytes; }
};

// As many of a row's words as a vector takes, zeros behind its end.
inline Vec load_rest(const Problem& p, const char* row, int64_t word) {
  const int64_t num_bytes = std::min<int64_t>(LANES * WORD, p.row_bytes - word * WORD);
  if (num_bytes == LANES * WORD) return load(row + word * WORD);
  Vec out = {};
  std::memcpy(&out, row + word * WORD, num_bytes);
  return out;
}

// ------------------------------------------------------------------------------------------------------- few rows

// Groups of GROUP rows, each as [words / LANES, GROUP, LANES]; rows and words that are not there are 0.
void pack_groups(const Problem& p, float* packed) {
  const int64_t turns = (p.words() + LANES - 1) / LANES;
  for (int64_t row = 0; row < (p.rows + GROUP - 1) / GROUP * GROUP; ++row)
    for (int64_t turn = 0; turn < turns; ++turn) {
      float* to = packed + ((row / GROUP * turns + turn) * GROUP + row % GROUP) * LANES;
      store(to, row < p.rows ? load_rest(p, p.input(row), turn * LANES) : Vec{});
    }
}

// Fetches FETCH lines of `coming` for each vector of the columns.
template <typename Format, int FETCH>
inline void multiply_group(const Problem& p, const float* group, const char* const* columns, const char* coming,
                           float* sums_out) {
  // whole vectors to add up: what is behind the last sum stays 0
  constexpr int NUM = (GROUP * COLUMNS + LANES - 1) / LANES * LANES;
  Vec sums[NUM] = {};
  auto take_part = [&](auto words, auto part) __attribute__((always_inline)) {
    Vec weights[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      weights[c] = Format::template part<part()>(words(c));
      keep_in_register(weights[c]);
    }
    for (int r = 0; r < GROUP; ++r) {
      const Vec input = Format::template part<part()>(load(group + r * LANES));
      for (int c = 0; c < COLUMNS; ++c) Format::add(sums[r * COLUMNS + c], input, weights[c]);
    }
  };
  auto take = [&](auto words) __attribute__((always_inline)) {
    take_part(words, std::integral_constant<int, 0>{});
    if constexpr (Format::PARTS == 2) take_part(words, std::integral_constant<int, 1>{});
    group += GROUP * LANES;
  };
  int64_t word = 0;
  for (; (word + LANES) * WORD <= p.row_bytes; word += LANES) {
    for (int i = 0; i < FETCH; ++i, coming += LANES * WORD) __builtin_prefetch(coming, 0, 2);
    take([&](int c) { return load(columns[c] + word * WORD); });
  }
  if (word * WORD < p.row_bytes) {
    Vec rest[COLUMNS] = {};  // not load_rest as they are used: around its branches GCC keeps the loop's sums in memory
    for (int c = 0; c < COLUMNS; ++c) std::memcpy(&rest[c], columns[c] + word * WORD, p.row_bytes - word * WORD);
    take([&](int c) { return rest[c]; });
  }
  for (int i = 0; i < NUM; i += LANES) store(sums_out + i, add_lanes(sums + i));
}

template <typename Format, int GROUPS>  // what is to come is fetched a little by each
void multiply_few(const Problem& p, const float* packed, int64_t first_column, int64_t last_column) {
  const int64_t group_size = (p.words() + LANES - 1) / LANES * LANES * GROUP;
  for (int64_t column = first_column; column < last_column; column += COLUMNS) {
    const char* columns[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) columns[c] = p.column(column + c);  // behind the last: that again, not stored
    const char* coming = p.column(column + COLUMNS);
    const int64_t num_columns = std::min<int64_t>(COLUMNS, last_column - column);
    for (int64_t i = 0; i < GROUPS; ++i) {
      float sums[(GROUP * COLUMNS + LANES - 1) / LANES * LANES];
      constexpr int FETCH = (COLUMNS + GROUPS - 1) / GROUPS;
      multiply_group<Format, FETCH>(p, packed + i * group_size, columns, coming + i * FETCH * p.row_bytes, sums);
      for (int64_t r = 0; r < std::min<int64_t>(GROUP, p.rows - i * GROUP); ++r)
        std::copy_n(sums + r * COLUMNS, num_columns, p.outputs + (i * GROUP + r) * p.out_dim + column);
    }
  }
}

template <typename Format>
void multiply_few(const Problem& p, const float* packed, int64_t first_column, int64_t last_column) {
  switch ((p.rows + GROUP - 1) / GROUP) {
    case 1: return multiply_few<Format, 1>(p, packed, first_column, last_column);
    case 2: return multiply_few<Format, 2>(p, packed, first_column, last_column);
    case 3: return multiply_few<Format, 3>(p, packed, first_column, last_column);
    case 4: return multiply_few<Format, 4>(p, packed, first_column, last_column);
  }
}

// ------------------------------------------------------------------------------------------------------ many rows

// A panel's rows are first_row to first_row + rows - 1, in `vectors` vectors; those not there are 0.
struct Panel {
  int64_t first_row, rows;
  int vectors;
  float* packed;  // [words, vectors * LANES]
};

void pack_panel(const Problem& p, const Panel& panel) {
  for (int64_t word = 0; word < p.words(); word += LANES)
    for (int v = 0; v < panel.vectors; ++v) {
      Vec square[LANES] = {};
      const int64_t first = panel.first_row + v * LANES, rows = std::min<int64_t>(LANES, panel.rows - v * LANES);
      for (int64_t row = 0; row < rows; ++row) square[row] = load_rest(p, p.input(first + row), word);
      transpose(square);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, p.words() - word); ++i)
        store(panel.packed + ((word + i) * panel.vectors + v) * LANES, square[i]);
    }
}

// Sums of a part of `in` for a few columns, added to those of the parts before: sums_out is [columns, PANEL_ROWS].
template <typename Format, int V, bool FETCH>
inline void multiply_panel(const Problem& p, const Panel& panel, int64_t column, int64_t depth, int64_t last_depth,
                           float* sums_out) {
  constexpr int C = WIDTHS[V - 1];
  const char *columns[C], *coming[C];
  for (int c = 0; c < C; ++c) {
    columns[c] = p.column(column + c);
    coming[c] = p.column(column + C + c);
  }
  Vec sums[C][V] = {};
  const float* input = panel.packed + depth * V * LANES;
  auto take_part = [&](int64_t word, int64_t num_bytes, auto part) __attribute__((always_inline)) {
    Vec rows[V];
    for (int v = 0; v < V; ++v) rows[v] = Format::template part<part()>(load(input + v * LANES));
    for (int c = 0; c < C; ++c) {
      float weights = 0.0f;
      std::memcpy(&weights, columns[c] + word * WORD, num_bytes);
      const Vec weight = Format::template part<part()>(broadcast(weights));
      for (int v = 0; v < V; ++v) Format::add(sums[c][v], rows[v], weight);
    }
  };
  auto take = [&](int64_t word, int64_t num_bytes) __attribute__((always_inline)) {
    take_part(word, num_bytes, std::integral_constant<int, 0>{});
    if constexpr (Format::PARTS == 2) take_part(word, num_bytes, std::integral_constant<int, 1>{});
    input += V * LANES;
  };
  const int64_t last_whole = std::min(last_depth, p.row_bytes / WORD);
  int64_t word = depth;
  for (; word + 16 <= last_whole; word += 16) {  // a cache line of each column
    if (FETCH)
      for (int c = 0; c < C; ++c) __builtin_prefetch(coming[c] + word * WORD, 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) take(word + i, WORD);
  }
  for (; word < last_whole; ++word) take(word, WORD);
  if (word < last_depth) take(word, p.row_bytes % WORD);
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < V; ++v) {
      float* to = sums_out + c * PANEL_ROWS + v * LANES;
      store(to, depth ? load(to) + sums[c][v] : sums[c][v]);
    }
}

// Some columns of all rows of a panel.
template <typename Format, int V>
void multiply_panel(const Problem& p, const Panel& panel, int64_t first_column, int64_t last_column, float* sums) {
  constexpr int C = WIDTHS[V - 1];
  for (int64_t depth = 0; depth < p.words(); depth += DEPTH)
    for (int64_t column = first_column; column < last_column; column += C) {
      const int64_t last_depth = std::min(depth + DEPTH, p.words());
      float* to = sums + (column - first_column) * PANEL_ROWS;
      if (panel.first_row == 0) multiply_panel<Format, V, true>(p, panel, column, depth, last_depth, to);
      else multiply_panel<Format, V, false>(p, panel, column, depth, last_depth, to);
    }
  for (int64_t column = first_column; column < last_column; column += LANES)
    for (int64_t row = 0; row < panel.rows; row += LANES) {
      Vec square[LANES];
      const float* from = sums + (column - first_column) * PANEL_ROWS + row;
      for (int c = 0; c < LANES; ++c) square[c] = load(from + c * PANEL_ROWS);
      transpose(square);
      const int64_t num_columns = std::min<int64_t>(LANES, last_column - column);
      float* to = p.outputs + (panel.first_row + row) * p.out_dim + column;
      for (int64_t r = 0; r < std::min<int64_t>(LANES, panel.rows - row); ++r, to += p.out_dim)
        if (num_columns == LANES) store(to, square[r]);
        else std::memcpy(to, &square[r], num_columns * sizeof(float));
    }
}

template <typename Format>
void multiply_panel(const Problem& p, const Panel& panel, int64_t first_column, int64_t last_column) {
  static thread_local Scratch scratch;
  // a last tile of columns, and the last square, may go beyond
  float* sums = scratch.resize((last_column - first_column + MAX_WIDTH + LANES) * PANEL_ROWS);
  switch (panel.vectors) {
    case 1: return multiply_panel<Format, 1>(p, panel, first_column, last_column, sums);
    case 2: return multiply_panel<Format, 2>(p, panel, first_column, last_column, sums);
#if defined(__AVX512F__)
    case 3: return multiply_panel<Format, 3>(p, panel, first_column, last_column, sums);
    case 4: return multiply_panel<Format, 4>(p, panel, first_column, last_column, sums);
#endif
  }
}

// All rows in panels of as many vectors as the registers take, the last of as many as it needs.
std::vector<Panel> make_panels(const Problem& p, Scratch& scratch) {
  std::vector<Panel> panels;
  float* packed = scratch.resize((p.rows + LANES - 1) / LANES * LANES * p.words());
  for (int64_t row = 0; row < p.rows; row += MAX_VECTORS * LANES) {
    const int64_t rows = std::min<int64_t>(MAX_VECTORS * LANES, p.rows - row);
    panels.push_back({row, rows, static_cast<int>((rows + LANES - 1) / LANES), packed + row * p.words()});
  }
  return panels;
}

// ------------------------------------------------------------------------------------------------------------ all

template <typename Format>
ffi::Error multiply(ffi::ThreadPool threads, const Problem& p) {
  static thread_local Scratch packed;  // other threads read it while this one waits for them

  // columns per item: so many that all threads end together, in cache, and worth another thread's start
  const int64_t words = std::max<int64_t>(p.words(), 1), rows = std::max<int64_t>(p.rows, 1);
  const int64_t shared = p.out_dim / (threads.num_threads() * ITEMS_PER_THREAD);
  const int64_t most = std::min(shared, MAX_ITEM_WORDS / words), least = MIN_ITEM_PRODUCTS / (rows * words);
  const int64_t columns = std::max({most, least, COLUMNS_STEP}) / COLUMNS_STEP * COLUMNS_STEP;
  const int64_t items = (p.out_dim + columns - 1) / columns;
  auto last_column = [=](int64_t item) { return std::min((item + 1) * columns, p.out_dim); };

  if (p.rows <= FEW) {
    float* groups = packed.resize((p.rows + GROUP - 1) / GROUP * GROUP * ((p.words() + LANES - 1) / LANES * LANES));
    pack_groups(p, groups);
    parallel_for(threads, items, [=](int64_t item) {
      multiply_few<Format>(p, groups, item * columns, last_column(item));
    });
    return ffi::Error::Success();
  }
  const std::vector<Panel> made = make_panels(p, packed);
  const Panel* panels = made.data();
  const int64_t num_panels = made.size();
  parallel_for(threads, num_panels, [=](int64_t item) { pack_panel(p, panels[item]); });
  parallel_for(threads, items, [=](int64_t item) {
    for (int64_t i = 0; i < num_panels; ++i)
      multiply_panel<Format>(p, panels[i], item * columns, last_column(item));
  });
  return ffi::Error::Success();
}

ffi::Error multiply(ffi::ThreadPool threads, ffi::AnyBuffer inputs, const char* kernel, int64_t out_dim,
                    ffi::Result<ffi::Buffer<ffi::F32>> outputs) {
  const auto x = inputs.dimensions();
  const bool is_float32 = inputs.element_type() == ffi::F32;
  const int64_t row_bytes = x[1] * (is_float32 ? sizeof(float) : sizeof(uint16_t));
  const Problem p = {static_cast<const char*>(inputs.untyped_data()), kernel, outputs->typed_data(), x[0], out_dim,
                     row_bytes};
  return is_float32 ? multiply<Float32>(threads, p) : multiply<BFloat16>(threads, p);
}

bool is_float(ffi::AnyBuffer inputs, ffi::AnyBuffer kernel) {
  const auto type = inputs.element_type();
  return type == kernel.element_type() && (type == ffi::F32 || type == ffi::BF16);
}

ffi::Error run(ffi::ThreadPool threads, ffi::AnyBuffer inputs, ffi::AnyBuffer kernel,
               ffi::Result<ffi::Buffer<ffi::F32>> outputs) {
  const auto x = inputs.dimensions(), w = kernel.dimensions();
  if (!is_float(inputs, kernel) || x.size() != 2 || w.size() != 2 || x[1] != w[1])
    return ffi::Error::InvalidArgument("inputs must be [rows, in] and kernel [out, in], both float32 or bfloat16");
  return multiply(threads, inputs, static_cast<const char*>(kernel.untyped_data()), w[0], outputs);
}

// the same with one kernel of many, which is read where it lies
ffi::Error run_at(ffi::ThreadPool threads, ffi::AnyBuffer inputs, ffi::AnyBuffer kernels,
                  ffi::Buffer<ffi::S32> index, ffi::Result<ffi::Buffer<ffi::F32>> outputs) {
  const auto x = inputs.dimensions(), w = kernels.dimensions();
  if (!is_float(inputs, kernels) || x.size() != 2 || w.size() != 3 || x[1] != w[2] || w[0] < 1 ||
      index.element_count() != 1)
    return ffi::Error::InvalidArgument(
        "inputs must be [rows, in], kernels [number, out, in], both float32 or bfloat16, and index one of the kernels");
  const int64_t at = std::clamp<int64_t>(*index.typed_data(), 0, w[0] - 1);
  const char* kernel = static_cast<const char*>(kernels.untyped_data());
  return multiply(threads, inputs, kernel + at * (kernels.size_bytes() / w[0]), w[1], outputs);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_at, run_at,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
