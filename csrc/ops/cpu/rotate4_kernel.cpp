// The four rotations of images on the CPU; csrc/ops/rotate4.h has the formulas and the least traffic.
//
// Where a pixel is one element of 1, 2, 4 or 8 bytes, an image plane is cut into blocks of B×B that fit into registers:
//
//   forward    load B rows ──▶ y₀; mirrored ──▶ y₂; transpose ──▶ y₁ (its rows upside down); mirrored ──▶ y₃
//   backward   g₁ + mirrored g₃, transpose, + (g₀ + mirrored g₂) ──▶ dx
//
// so that memory is read and written in whole vectors only, and one transpose serves two rotations. A transpose takes
// log₂B rounds of interleaving rows i and i + B/2. The last block of a row or column that B does not divide is moved
// back to overlap the one before it: forward writes some pixels twice, with the same values; backward likewise.
// Planes smaller than a block, and pixels of several elements (channels_last), go pixel by pixel.
#include <ATen/Parallel.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "csrc/common/float16.h"
#include "csrc/common/vec.h"
#include "csrc/ops/rotate4.h"

namespace sslfast {
namespace CPU_CAPABILITY {
namespace {

#define SSLFAST_INLINE inline __attribute__((always_inline))

constexpr int64_t kTaskBytes = int64_t{1} << 16;  // of all that a task of parallel_for reads and writes, at least

// ---------------------------------------------------------------------------------------------------- blocks

template <size_t kBytes>
using Unsigned =
    std::conditional_t<kBytes == 1, uint8_t,
                       std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

/// A block of B×B elements of T, a vector a row. B rows fit into the registers with something to spare.
template <typename T>
struct Block {
  static constexpr int kSize =
      kVecBytes / static_cast<int>(sizeof(T)) < 16 ? kVecBytes / static_cast<int>(sizeof(T)) : 16;
  typedef T Row __attribute__((vector_size(kSize * sizeof(T))));
  typedef Unsigned<sizeof(T)> Index __attribute__((vector_size(kSize * sizeof(T))));
  Row row[kSize];
};

/// Lane i of the result is lane kFrom::at(i) of a and b side by side.
template <typename T, typename From, size_t... I>
SSLFAST_INLINE typename Block<T>::Row shuffle(typename Block<T>::Row a, typename Block<T>::Row b,
                                              std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, From::at(I)...);
#else
  return __builtin_shuffle(a, b, typename Block<T>::Index{static_cast<Unsigned<sizeof(T)>>(From::at(I))...});
#endif
}

template <int kSize>
struct Mirror {
  static constexpr int at(int lane) { return kSize - 1 - lane; }
};
template <int kSize>
struct InterleaveLow {
  static constexpr int at(int lane) { return lane / 2 + (lane % 2) * kSize; }
};
template <int kSize>
struct InterleaveHigh {
  static constexpr int at(int lane) { return kSize / 2 + lane / 2 + (lane % 2) * kSize; }
};

template <typename T>
SSLFAST_INLINE typename Block<T>::Row mirror(typename Block<T>::Row row) {
  constexpr int kSize = Block<T>::kSize;
  return shuffle<T, Mirror<kSize>>(row, row, std::make_index_sequence<kSize>());
}

template <typename T>
SSLFAST_INLINE void transpose(Block<T>& block) {
  constexpr int kSize = Block<T>::kSize;
  constexpr auto lanes = std::make_index_sequence<kSize>();
#pragma GCC unroll 4
  for (int round = 1; round < kSize; round *= 2) {
    Block<T> next;
#pragma GCC unroll 8
    for (int i = 0; i < kSize / 2; ++i) {
      const auto a = block.row[i], b = block.row[i + kSize / 2];
      next.row[2 * i] = shuffle<T, InterleaveLow<kSize>>(a, b, lanes);
      next.row[2 * i + 1] = shuffle<T, InterleaveHigh<kSize>>(a, b, lanes);
    }
    block = next;
  }
}

template <typename T>
SSLFAST_INLINE typename Block<T>::Row load_row(const T* p) {
  typename Block<T>::Row row;
  std::memcpy(&row, p, sizeof row);
  return row;
}

template <typename T>
SSLFAST_INLINE void store_row(T* p, typename Block<T>::Row row) {
  std::memcpy(p, &row, sizeof row);
}

/// function(first row, first column) of every block of a plane.
template <typename Function>
SSLFAST_INLINE void for_blocks(int64_t size, int64_t block, const Function& function) {
  for (int64_t i = 0; i < size; i += block)
    for (int64_t j = 0; j < size; j += block)
      function(i + block < size ? i : size - block, j + block < size ? j : size - block);
}

template <typename T>
void rotate_plane_by_blocks(const T* x, T* y0, T* y1, T* y2, T* y3, int64_t size) {
  constexpr int kSize = Block<T>::kSize;
  for_blocks(size, kSize, [&](int64_t i0, int64_t j0) __attribute__((always_inline)) {
    const int64_t mirrored_i = size - 1 - i0, mirrored_j = size - 1 - j0;
    Block<T> block;
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) {
      block.row[i] = load_row(x + (i0 + i) * size + j0);
      store_row(y0 + (i0 + i) * size + j0, block.row[i]);
      store_row(y2 + (mirrored_i - i) * size + mirrored_j + 1 - kSize, mirror<T>(block.row[i]));
    }
    transpose(block);
#pragma GCC unroll 16
    for (int j = 0; j < kSize; ++j) {
      store_row(y1 + (mirrored_j - j) * size + i0, block.row[j]);
      store_row(y3 + (j0 + j) * size + mirrored_i + 1 - kSize, mirror<T>(block.row[j]));
    }
  });
}

// ---------------------------------------------------------------------------------------------------- gradients

/// How elements are stored, and the type in which they are added; of single elements and of rows of a block.
template <typename T>
struct Exact {
  using Stored = T;
  using Sum = T;
  using Row = typename Block<T>::Row;
  static SSLFAST_INLINE T load(T x) { return x; }
  static SSLFAST_INLINE T round(T x) { return x; }
  static SSLFAST_INLINE Row load_row_of(const T* p) { return load_row(p); }
  static SSLFAST_INLINE void store_row_of(T* p, Row row) { store_row(p, row); }
};

template <bool kBFloat16>
struct Half {
  using Stored = uint16_t;
  using Sum = float;
  using Row = typename Block<float>::Row;
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Row))));
  typedef uint16_t Halves __attribute__((vector_size(sizeof(Row) / 2)));

  template <typename Float, typename B>
  static SSLFAST_INLINE Float widen(B bits) {
    return kBFloat16 ? from_bfloat16_bits<Float, B>(bits) : from_float16_bits<Float, B>(bits);
  }
  template <typename Float, typename B>
  static SSLFAST_INLINE B narrow(Float x) {
    return kBFloat16 ? to_bfloat16_bits<Float, B>(x) : to_float16_bits<Float, B>(x);
  }
  static SSLFAST_INLINE float load(uint16_t x) { return widen<float, uint32_t>(x); }
  static SSLFAST_INLINE uint16_t round(float x) { return static_cast<uint16_t>(narrow<float, uint32_t>(x)); }
  static SSLFAST_INLINE Row load_row_of(const uint16_t* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return widen<Row, Bits>(__builtin_convertvector(halves, Bits));
  }
  static SSLFAST_INLINE void store_row_of(uint16_t* p, Row row) {
    const Halves halves = __builtin_convertvector((narrow<Row, Bits>(row)), Halves);
    std::memcpy(p, &halves, sizeof halves);
  }
};

template <typename Type, typename T = typename Type::Stored>
void gather_plane_by_blocks(const T* g0, const T* g1, const T* g2, const T* g3, T* dx, int64_t size) {
  using Sum = typename Type::Sum;
  constexpr int kSize = Block<Sum>::kSize;
  for_blocks(size, kSize, [&](int64_t i0, int64_t j0) __attribute__((always_inline)) {
    const int64_t mirrored_i = size - 1 - i0, mirrored_j = size - 1 - j0;
    Block<Sum> block;
#pragma GCC unroll 16
    for (int j = 0; j < kSize; ++j)
      block.row[j] = Type::load_row_of(g1 + (mirrored_j - j) * size + i0) +
                     mirror<Sum>(Type::load_row_of(g3 + (j0 + j) * size + mirrored_i + 1 - kSize));
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) {
      const auto straight = Type::load_row_of(g0 + (i0 + i) * size + j0) +
                            mirror<Sum>(Type::load_row_of(g2 + (mirrored_i - i) * size + mirrored_j + 1 - kSize));
      Type::store_row_of(dx + (i0 + i) * size + j0, straight + block.row[i]);
    }
  });
}

// ---------------------------------------------------------------------------------------------------- pixels

/// One image or plane of pixels of kBytes, or of `bytes` where kBytes is 0.
template <size_t kBytes>
void rotate_plane_by_pixels(const char* x, char* y0, char* y1, char* y2, char* y3, int64_t size, size_t bytes) {
  const size_t pixel = kBytes != 0 ? kBytes : bytes;
  const auto at = [&](int64_t i, int64_t j) { return (i * size + j) * static_cast<int64_t>(pixel); };
  const int64_t last = size - 1;
  std::memcpy(y0, x, size * size * pixel);
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) std::memcpy(y1 + at(i, j), x + at(j, last - i), pixel);
    for (int64_t j = 0; j < size; ++j) std::memcpy(y2 + at(i, j), x + at(last - i, last - j), pixel);
    for (int64_t j = 0; j < size; ++j) std::memcpy(y3 + at(i, j), x + at(last - j, i), pixel);
  }
}

template <typename Type, int kElements, typename T = typename Type::Stored>
void gather_plane_by_pixels(const T* g0, const T* g1, const T* g2, const T* g3, T* dx, int64_t size, int64_t elements) {
  const int64_t pixel = kElements != 0 ? kElements : elements, last = size - 1;
  const auto at = [&](int64_t i, int64_t j) { return (i * size + j) * pixel; };
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      const T* __restrict a = g0 + at(i, j);
      const T* __restrict b = g1 + at(last - j, i);
      const T* __restrict c = g2 + at(last - i, last - j);
      const T* __restrict d = g3 + at(j, last - i);
      T* __restrict to = dx + at(i, j);
      for (int64_t e = 0; e < pixel; ++e)
        to[e] = Type::round((Type::load(a[e]) + Type::load(c[e])) + (Type::load(b[e]) + Type::load(d[e])));
    }
  }
}

// ---------------------------------------------------------------------------------------------------- all planes

/// function(offset of a plane in its image, number of the image) in elements, for all planes, on all threads.
template <typename Function>
void for_planes(const Rotate4Params& p, int64_t element_bytes, const Function& function) {
  const int64_t plane = p.size * p.size * p.pixel;
  const int64_t grain = 1 + kTaskBytes / (5 * element_bytes * (plane > 0 ? plane : 1));
  at::parallel_for(0, p.images * p.planes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) function(task % p.planes * plane, task / p.planes);
  });
}

template <size_t kElementBytes>
void rotate(const Rotate4Params& p) {
  const int64_t image = p.image_elements() * kElementBytes, block = p.images * image;
  const size_t pixel = p.pixel * kElementBytes;
  for_planes(p, kElementBytes, [&](int64_t offset, int64_t n) {
    const char* x = static_cast<const char*>(p.in) + (n * p.image_stride + offset) * kElementBytes;
    char* y = static_cast<char*>(p.out) + n * image + offset * kElementBytes;
    const auto by_blocks = [&](auto element) {
      using T = decltype(element);
      if (p.size < Block<T>::kSize) return false;
      T* to = reinterpret_cast<T*>(y);
      const int64_t step = block / static_cast<int64_t>(sizeof(T));
      rotate_plane_by_blocks(reinterpret_cast<const T*>(x), to, to + step, to + 2 * step, to + 3 * step, p.size);
      return true;
    };
    const auto by_pixels = [&](auto bytes) {
      rotate_plane_by_pixels<bytes>(x, y, y + block, y + 2 * block, y + 3 * block, p.size, pixel);
    };
    if (pixel == kElementBytes && by_blocks(Unsigned<kElementBytes>{})) return;
    switch (pixel) {
      case 1:
        return by_pixels(std::integral_constant<size_t, 1>());
      case 2:
        return by_pixels(std::integral_constant<size_t, 2>());
      case 3:
        return by_pixels(std::integral_constant<size_t, 3>());
      case 4:
        return by_pixels(std::integral_constant<size_t, 4>());
      case 6:
        return by_pixels(std::integral_constant<size_t, 6>());
      case 8:
        return by_pixels(std::integral_constant<size_t, 8>());
      case 12:
        return by_pixels(std::integral_constant<size_t, 12>());
      default:
        return by_pixels(std::integral_constant<size_t, 0>());
    }
  });
}

template <typename Type>
void gather(const Rotate4Params& p) {
  using T = typename Type::Stored;
  const int64_t image = p.image_elements(), block = p.images * image;
  for_planes(p, sizeof(T), [&](int64_t offset, int64_t n) {
    const T* g = static_cast<const T*>(p.in) + n * image + offset;
    T* dx = static_cast<T*>(p.out) + n * image + offset;
    const auto run = [&](auto function, auto... more) {
      function(g, g + block, g + 2 * block, g + 3 * block, dx, p.size, more...);
    };
    if (p.pixel == 1 && p.size >= Block<typename Type::Sum>::kSize) return run(gather_plane_by_blocks<Type>);
    if (p.pixel == 1) return run(gather_plane_by_pixels<Type, 1>, p.pixel);
    if (p.pixel == 3) return run(gather_plane_by_pixels<Type, 3>, p.pixel);
    return run(gather_plane_by_pixels<Type, 0>, p.pixel);
  });
}

}  // namespace

void launch_rotate4_forward_cpu(const Rotate4Params& p) {
  for (int64_t i = 0; i < 4 * p.images; ++i) p.labels[i] = i / p.images;
  switch (p.dtype) {
    case at::kByte:
      return rotate<1>(p);
    case at::kBFloat16:
    case at::kHalf:
      return rotate<2>(p);
    case at::kDouble:
      return rotate<8>(p);
    default:
      return rotate<4>(p);
  }
}

void launch_rotate4_backward_cpu(const Rotate4Params& p) {
  switch (p.dtype) {
    case at::kBFloat16:
      return gather<Half<true>>(p);
    case at::kHalf:
      return gather<Half<false>>(p);
    case at::kDouble:
      return gather<Exact<double>>(p);
    default:
      return gather<Exact<float>>(p);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace sslfast
