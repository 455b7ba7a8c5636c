// inputs [rows, in] times the transpose of a kernel [out, in], float32, for CPUs, called by XLA through its foreign
// function interface. Compiled on the machine it runs on (../native_library.py), with the compiler's own vector types.
//
// Few rows are bound by the memory the kernel comes from, many by the multipliers, so there are two loops:
// - up to FEW rows: a lane holds every LANES-th product of one sum, GROUP rows and COLUMNS columns share the registers,
//   and the lanes are added at the end. The kernel is read as it lies.
// - more: a lane is a row. Inputs are brought into panels [in, rows], each element of the kernel is spread over a vector.
// Both fetch the columns that come next while they compute. Every sum runs in an order that depends on `in` and on which
// loop it is in, and on nothing else: neither on its row or column, nor on how many there are, nor on the threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

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
constexpr int64_t DEPTH = 256;                 // of `in` that is summed at a time: shorter sums are more precise
constexpr int64_t MAX_ITEM_WEIGHTS = 1 << 16;  // elements of the kernel, to stay in the second cache
constexpr int64_t COLUMNS_STEP = 24;           // a multiple of every width
constexpr int64_t ITEMS_PER_THREAD = 4;
constexpr int64_t MIN_ITEM_PRODUCTS = 1 << 15;  // fewer are not worth another thread's start

typedef float Vec __attribute__((vector_size(LANES * 4)));

inline Vec load(const float* from) {
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
  const float *inputs, *kernel;
  float* outputs;
  int64_t rows, out_dim, in_dim;
};

// ------------------------------------------------------------------------------------------------------- few rows

// Groups of GROUP rows, each as [in / LANES, GROUP, LANES]; rows and elements that are not there are 0.
void pack_groups(const Problem& p, float* packed) {
  const int64_t turns = (p.in_dim + LANES - 1) / LANES;
  for (int64_t row = 0; row < (p.rows + GROUP - 1) / GROUP * GROUP; ++row)
    for (int64_t turn = 0; turn < turns; ++turn) {
      float* to = packed + ((row / GROUP * turns + turn) * GROUP + row % GROUP) * LANES;
      const int64_t there = row < p.rows ? std::min<int64_t>(LANES, p.in_dim - turn * LANES) : 0;
      std::copy_n(p.inputs + row * p.in_dim + turn * LANES, there, to);
      std::fill(to + there, to + LANES, 0.0f);
    }
}

// Fetches FETCH lines of `coming` for each vector of the columns.
template <int FETCH>
inline void multiply_group(const float* group, const float* const* columns, const float* coming, int64_t in_dim,
                           float* sums_out) {
  // whole vectors to add up: what is behind the last sum stays 0
  constexpr int NUM = (GROUP * COLUMNS + LANES - 1) / LANES * LANES;
  Vec sums[NUM] = {};
  auto take = [&](auto weights) {
    for (int r = 0; r < GROUP; ++r) {
      const Vec input = load(group + r * LANES);
      for (int c = 0; c < COLUMNS; ++c) sums[r * COLUMNS + c] += input * weights[c];
    }
    group += GROUP * LANES;
  };
  int64_t k = 0;
  for (; k + LANES <= in_dim; k += LANES) {
    Vec weights[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      weights[c] = load(columns[c] + k);
      keep_in_register(weights[c]);
    }
    for (int i = 0; i < FETCH; ++i, coming += LANES) __builtin_prefetch(coming, 0, 2);
    take(weights);
  }
  if (k < in_dim) {
    Vec weights[COLUMNS] = {};
    for (int c = 0; c < COLUMNS; ++c) std::memcpy(&weights[c], columns[c] + k, (in_dim - k) * sizeof(float));
    take(weights);
  }
  for (int i = 0; i < NUM; i += LANES) store(sums_out + i, add_lanes(sums + i));
}

template <int GROUPS>  // what is to come is fetched a little by each
void multiply_few(const Problem& p, const float* packed, int64_t first_column, int64_t last_column) {
  const int64_t group_size = (p.in_dim + LANES - 1) / LANES * LANES * GROUP;
  for (int64_t column = first_column; column < last_column; column += COLUMNS) {
    const float* columns[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c)  // behind the last column: that one again, and not stored
      columns[c] = p.kernel + std::min(column + c, p.out_dim - 1) * p.in_dim;
    const float* coming = p.kernel + std::min(column + COLUMNS, p.out_dim - 1) * p.in_dim;
    const int64_t num_columns = std::min<int64_t>(COLUMNS, last_column - column);
    for (int64_t i = 0; i < GROUPS; ++i) {
      float sums[(GROUP * COLUMNS + LANES - 1) / LANES * LANES];
      constexpr int FETCH = (COLUMNS + GROUPS - 1) / GROUPS;
      multiply_group<FETCH>(packed + i * group_size, columns, coming + i * FETCH * p.in_dim, p.in_dim, sums);
      for (int64_t r = 0; r < std::min<int64_t>(GROUP, p.rows - i * GROUP); ++r)
        std::copy_n(sums + r * COLUMNS, num_columns, p.outputs + (i * GROUP + r) * p.out_dim + column);
    }
  }
}

void multiply_few(const Problem& p, const float* packed, int64_t first_column, int64_t last_column) {
  switch ((p.rows + GROUP - 1) / GROUP) {
    case 1: return multiply_few<1>(p, packed, first_column, last_column);
    case 2: return multiply_few<2>(p, packed, first_column, last_column);
    case 3: return multiply_few<3>(p, packed, first_column, last_column);
    case 4: return multiply_few<4>(p, packed, first_column, last_column);
  }
}

// ------------------------------------------------------------------------------------------------------ many rows

// A panel's rows are first_row to first_row + rows - 1, in `vectors` vectors; those not there are 0.
struct Panel {
  int64_t first_row, rows;
  int vectors;
  float* packed;  // [in, vectors * LANES]
};

void pack_panel(const Problem& p, const Panel& panel) {
  for (int64_t k = 0; k < p.in_dim; k += LANES) {
    const int64_t depth = std::min<int64_t>(LANES, p.in_dim - k);
    for (int v = 0; v < panel.vectors; ++v) {
      Vec square[LANES] = {};
      const int64_t num_rows = std::min<int64_t>(LANES, panel.rows - v * LANES);
      const float* from = p.inputs + (panel.first_row + v * LANES) * p.in_dim + k;
      if (depth == LANES)
        for (int64_t row = 0; row < num_rows; ++row) square[row] = load(from + row * p.in_dim);
      else
        for (int64_t row = 0; row < num_rows; ++row)
          std::memcpy(&square[row], from + row * p.in_dim, depth * sizeof(float));
      transpose(square);
      for (int64_t d = 0; d < depth; ++d) store(panel.packed + ((k + d) * panel.vectors + v) * LANES, square[d]);
    }
  }
}

// Sums of a part of `in` for a few columns, added to those of the parts before: sums_out is [columns, PANEL_ROWS].
template <int V, bool FETCH>
inline void multiply_panel(const Problem& p, const Panel& panel, int64_t column, int64_t depth, int64_t last_depth,
                           float* sums_out) {
  constexpr int C = WIDTHS[V - 1];
  const float *columns[C], *coming[C];
  for (int c = 0; c < C; ++c) {
    columns[c] = p.kernel + std::min(column + c, p.out_dim - 1) * p.in_dim;
    coming[c] = p.kernel + std::min(column + C + c, p.out_dim - 1) * p.in_dim;
  }
  Vec sums[C][V] = {};
  const float* input = panel.packed + depth * V * LANES;
  auto take = [&](int64_t k) {
    Vec rows[V];
    for (int v = 0; v < V; ++v) rows[v] = load(input + v * LANES);
    for (int c = 0; c < C; ++c) {
      const Vec weight = broadcast(columns[c][k]);
      for (int v = 0; v < V; ++v) sums[c][v] += rows[v] * weight;
    }
    input += V * LANES;
  };
  int64_t k = depth;
  for (; k + 16 <= last_depth; k += 16) {  // a cache line of each column
    if (FETCH)
      for (int c = 0; c < C; ++c) __builtin_prefetch(coming[c] + k, 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) take(k + i);
  }
  for (; k < last_depth; ++k) take(k);
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < V; ++v) {
      float* to = sums_out + c * PANEL_ROWS + v * LANES;
      store(to, depth ? load(to) + sums[c][v] : sums[c][v]);
    }
}

// Some columns of all rows of a panel.
template <int V>
void multiply_panel(const Problem& p, const Panel& panel, int64_t first_column, int64_t last_column, float* sums) {
  constexpr int C = WIDTHS[V - 1];
  for (int64_t depth = 0; depth < p.in_dim; depth += DEPTH)
    for (int64_t column = first_column; column < last_column; column += C) {
      const int64_t last_depth = std::min(depth + DEPTH, p.in_dim);
      float* to = sums + (column - first_column) * PANEL_ROWS;
      if (panel.first_row == 0) multiply_panel<V, true>(p, panel, column, depth, last_depth, to);
      else multiply_panel<V, false>(p, panel, column, depth, last_depth, to);
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

void multiply_panel(const Problem& p, const Panel& panel, int64_t first_column, int64_t last_column) {
  static thread_local Scratch scratch;
  // a last tile of columns, and the last square, may go beyond
  float* sums = scratch.resize((last_column - first_column + MAX_WIDTH + LANES) * PANEL_ROWS);
  switch (panel.vectors) {
    case 1: return multiply_panel<1>(p, panel, first_column, last_column, sums);
    case 2: return multiply_panel<2>(p, panel, first_column, last_column, sums);
#if defined(__AVX512F__)
    case 3: return multiply_panel<3>(p, panel, first_column, last_column, sums);
    case 4: return multiply_panel<4>(p, panel, first_column, last_column, sums);
#endif
  }
}

// All rows in panels of as many vectors as the registers take, the last of as many as it needs.
std::vector<Panel> make_panels(const Problem& p, Scratch& scratch) {
  std::vector<Panel> panels;
  float* packed = scratch.resize((p.rows + LANES - 1) / LANES * LANES * p.in_dim);
  for (int64_t row = 0; row < p.rows; row += MAX_VECTORS * LANES) {
    const int64_t rows = std::min<int64_t>(MAX_VECTORS * LANES, p.rows - row);
    panels.push_back({row, rows, static_cast<int>((rows + LANES - 1) / LANES), packed + row * p.in_dim});
  }
  return panels;
}

// ------------------------------------------------------------------------------------------------------------ all

ffi::Error multiply(ffi::ThreadPool threads, const Problem& p) {
  static thread_local Scratch packed;  // other threads read it while this one waits for them

  // columns per item: so many that all threads end together, in cache, and worth another thread's start
  const int64_t in_dim = std::max<int64_t>(p.in_dim, 1), rows = std::max<int64_t>(p.rows, 1);
  const int64_t shared = p.out_dim / (threads.num_threads() * ITEMS_PER_THREAD);
  const int64_t most = std::min(shared, MAX_ITEM_WEIGHTS / in_dim), least = MIN_ITEM_PRODUCTS / (rows * in_dim);
  const int64_t columns = std::max({most, least, COLUMNS_STEP}) / COLUMNS_STEP * COLUMNS_STEP;
  const int64_t items = (p.out_dim + columns - 1) / columns;
  auto last_column = [=](int64_t item) { return std::min((item + 1) * columns, p.out_dim); };

  if (p.rows <= FEW) {
    float* groups = packed.resize((p.rows + GROUP - 1) / GROUP * GROUP * ((p.in_dim + LANES - 1) / LANES * LANES));
    pack_groups(p, groups);
    parallel_for(threads, items, [=](int64_t item) { multiply_few(p, groups, item * columns, last_column(item)); });
    return ffi::Error::Success();
  }
  const std::vector<Panel> made = make_panels(p, packed);
  const Panel* panels = made.data();
  const int64_t num_panels = made.size();
  parallel_for(threads, num_panels, [=](int64_t item) { pack_panel(p, panels[item]); });
  parallel_for(threads, items, [=](int64_t item) {
    for (int64_t i = 0; i < num_panels; ++i) multiply_panel(p, panels[i], item * columns, last_column(item));
  });
  return ffi::Error::Success();
}

ffi::Error run(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> inputs, ffi::Buffer<ffi::F32> kernel,
               ffi::Result<ffi::Buffer<ffi::F32>> outputs) {
  const auto x = inputs.dimensions(), w = kernel.dimensions();
  if (x.size() != 2 || w.size() != 2 || x[1] != w[1])
    return ffi::Error::InvalidArgument("inputs must be [rows, in] and kernel [out, in]");
  return multiply(threads, {inputs.typed_data(), kernel.typed_data(), outputs->typed_data(), x[0], w[0], x[1]});
}

// the same with one kernel of many, which is read where it lies
ffi::Error run_at(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> inputs, ffi::Buffer<ffi::F32> kernels,
                  ffi::Buffer<ffi::S32> index, ffi::Result<ffi::Buffer<ffi::F32>> outputs) {
  const auto x = inputs.dimensions(), w = kernels.dimensions();
  if (x.size() != 2 || w.size() != 3 || x[1] != w[2] || w[0] < 1 || index.element_count() != 1)
    return ffi::Error::InvalidArgument("inputs must be [rows, in], kernels [number, out, in] and index one of them");
  const int64_t at = std::clamp<int64_t>(*index.typed_data(), 0, w[0] - 1);
  const float* kernel = kernels.typed_data() + at * w[1] * w[2];
  return multiply(threads, {inputs.typed_data(), kernel, outputs->typed_data(), x[0], w[1], x[1]});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_float32, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_float32_at, run_at,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
