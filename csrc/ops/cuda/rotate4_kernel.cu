// The four rotations of images on CUDA; csrc/ops/rotate4.h has the formulas and the least traffic, which is also the
// traffic here: every element of x and y is moved once.
//
// A block takes a tile of a plane, side × side pixels of `depth` elements (some of a pixel's channels, for
// channels_last), through shared memory. A row of a tile is side·depth elements that lie side by side in memory if
// depth is all of a pixel. Forward reads the tile once and writes it four times, each time by rows of y; backward
// brings g₁ + g₃ into shared memory by their rows and adds g₀ + g₂ as it writes dx by rows. Tiles are padded by a
// pixel, so that columns of floats lie in different banks.
//
// No atomics; every element of dx is one sum in a fixed order.
#include "csrc/common/convert.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/memory.cuh"
#include "csrc/ops/cuda/rotate4_kernel.h"

namespace sslfast {
namespace {

constexpr int kThreads = 256;
constexpr int kTileElements = 4096;  // side·side·depth is at most this

struct TileParams {
  const void* in;
  void* out;
  int64_t* labels;
  int64_t images, image_stride, image_elements;
  int planes, size, pixel;
  int side, depth;    // of a tile
  int tiles, slices;  // tiles in a row of pixels; slices of `depth` in a pixel
};

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/// Which tile this block has: elements of one plane of one image, from row `i`, column `j` and channel `c` on.
struct Tile {
  int64_t image, plane;  // number of the image; offset of the plane in it
  int i, j, c;
  int rows, columns, depth;

  __device__ explicit Tile(const TileParams& p) {
    int64_t number = blockIdx.x;
    c = static_cast<int>(number % p.slices) * p.depth;
    number /= p.slices;
    j = static_cast<int>(number % p.tiles) * p.side;
    number /= p.tiles;
    i = static_cast<int>(number % p.tiles) * p.side;
    number /= p.tiles;
    plane = number % p.planes * p.size * p.size * p.pixel;
    image = number / p.planes;
    rows = min(p.side, p.size - i);
    columns = min(p.side, p.size - j);
    depth = min(p.depth, p.pixel - c);
  }

  /// Calls function(row, column, channel within the tile) of all its elements, neighbours in memory side by side.
  template <typename Function>
  __device__ __forceinline__ void for_elements(int row_count, int column_count, const Function& function) const {
    const int width = column_count * depth;
    for (int e = threadIdx.x; e < row_count * width; e += kThreads) {
      const int row = e / width, rest = e - row * width;
      const int column = rest / depth;
      function(row, column, rest - column * depth);
    }
  }
};

__device__ __forceinline__ int64_t offset(const TileParams& p, int i, int j, int c) {
  return (int64_t{i} * p.size + j) * p.pixel + c;
}

__device__ __forceinline__ int place(const TileParams& p, int row, int column, int c) {
  return (row * (p.side + 1) + column) * p.depth + c;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rotate4_forward_kernel(TileParams p) {
  T* tile = reinterpret_cast<T*>(shared_memory());
  const Tile t(p);
  const T* x = static_cast<const T*>(p.in) + t.image * p.image_stride + t.plane;
  t.for_elements(t.rows, t.columns, [&](int row, int column, int c) {
    tile[place(p, row, column, c)] = load_global(x + offset(p, t.i + row, t.j + column, t.c + c));
  });
  __syncthreads();
  const int64_t step = p.images * p.image_elements;
  T* y = static_cast<T*>(p.out) + t.image * p.image_elements + t.plane;
  const int first_i = p.size - t.i - t.rows, first_j = p.size - t.j - t.columns;  // where the mirrored tile begins
  t.for_elements(t.rows, t.columns, [&](int row, int column, int c) {
    store_global(y + offset(p, t.i + row, t.j + column, t.c + c), tile[place(p, row, column, c)]);
    store_global(y + 2 * step + offset(p, first_i + row, first_j + column, t.c + c),
                 tile[place(p, t.rows - 1 - row, t.columns - 1 - column, c)]);
  });
  t.for_elements(t.columns, t.rows, [&](int row, int column, int c) {
    store_global(y + step + offset(p, first_j + row, t.i + column, t.c + c),
                 tile[place(p, column, t.columns - 1 - row, c)]);
    store_global(y + 3 * step + offset(p, t.j + row, first_i + column, t.c + c),
                 tile[place(p, t.rows - 1 - column, row, c)]);
  });
  if (t.plane == 0 && t.i == 0 && t.j == 0 && t.c == 0 && threadIdx.x < 4)
    store_global(p.labels + threadIdx.x * p.images + t.image, static_cast<int64_t>(threadIdx.x));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rotate4_backward_kernel(TileParams p) {
  float* turned = reinterpret_cast<float*>(shared_memory());  // g₁ + g₃, as dx lies
  const Tile t(p);
  const int64_t step = p.images * p.image_elements;
  const T* g = static_cast<const T*>(p.in) + t.image * p.image_elements + t.plane;
  const auto load = [&](int64_t from) { return to_float(load_global(g + from)); };
  const int last = p.size - 1;
  t.for_elements(t.columns, t.rows, [&](int row, int column, int c) {
    const int i = t.i + column, j = t.j + row;
    turned[place(p, column, row, c)] =
        load(step + offset(p, last - j, i, t.c + c)) + load(3 * step + offset(p, j, last - i, t.c + c));
  });
  __syncthreads();
  T* dx = static_cast<T*>(p.out) + t.image * p.image_elements + t.plane;
  t.for_elements(t.rows, t.columns, [&](int row, int column, int c) {
    const int i = t.i + row, j = t.j + column;
    const float straight = load(offset(p, i, j, t.c + c)) + load(2 * step + offset(p, last - i, last - j, t.c + c));
    store_global(dx + offset(p, i, j, t.c + c), from_float<T>(straight + turned[place(p, row, column, c)]));
  });
}

void launch_tiles(const char* name, void (*kernel)(TileParams), const Rotate4CudaParams& p, size_t element_bytes,
                  cudaStream_t stream) {
  TileParams t{};
  t.in = p.in;
  t.out = p.out;
  t.labels = p.labels;
  t.images = p.images;
  t.image_stride = p.image_stride;
  t.image_elements = p.planes * p.size * p.size * p.pixel;
  if (t.images * t.image_elements == 0) return;
  t.planes = static_cast<int>(p.planes);
  t.size = static_cast<int>(p.size);
  t.pixel = static_cast<int>(p.pixel);
  t.depth = t.pixel < 64 ? t.pixel : 64;
  t.side = 32;
  while (t.side * t.side * t.depth > kTileElements) t.side /= 2;
  t.tiles = static_cast<int>(divide_up(t.size, t.side));
  t.slices = static_cast<int>(divide_up(t.pixel, t.depth));
  const int64_t blocks = t.images * t.planes * t.tiles * t.tiles * t.slices;
  if (blocks > 0x7FFFFFFF) throw std::runtime_error(std::string(name) + ": more than 2^31 - 1 tiles");
  const size_t shared_bytes = element_bytes * t.side * (t.side + 1) * t.depth;
  launch(kernel, {name, static_cast<unsigned>(blocks), kThreads, shared_bytes, stream}, t);
}

template <typename T>
void launch_forward(const Rotate4CudaParams& p, cudaStream_t stream) {
  launch_tiles("rotate4_forward", rotate4_forward_kernel<T>, p, sizeof(T), stream);
}

template <typename T>
void launch_backward(const Rotate4CudaParams& p, cudaStream_t stream) {
  launch_tiles("rotate4_backward", rotate4_backward_kernel<T>, p, sizeof(float), stream);
}

}  // namespace

void launch_rotate4_forward_cuda(const Rotate4CudaParams& p, cudaStream_t stream) {
  switch (p.type) {
    case Rotate4CudaType::uint8:
      return launch_forward<uint8_t>(p, stream);
    case Rotate4CudaType::bfloat16:
    case Rotate4CudaType::float16:
      return launch_forward<uint16_t>(p, stream);
    case Rotate4CudaType::float32:
      return launch_forward<uint32_t>(p, stream);
  }
}

void launch_rotate4_backward_cuda(const Rotate4CudaParams& p, cudaStream_t stream) {
  switch (p.type) {
    case Rotate4CudaType::bfloat16:
      return launch_backward<__nv_bfloat16>(p, stream);
    case Rotate4CudaType::float16:
      return launch_backward<__half>(p, stream);
    case Rotate4CudaType::float32:
      return launch_backward<float>(p, stream);
    case Rotate4CudaType::uint8:
      throw std::runtime_error("rotate4_backward: uint8 has no gradient");
  }
}

}  // namespace sslfast
