// The four rotations of square images (Gidaris et al. 2018, arXiv 1803.07728; for GANs: Chen et al. 2019, arXiv
// 1811.11212).
//
// x (n, C, S, S). Block k of the result, y_k = y[k·n … (k+1)·n], is x turned counter-clockwise by k·90°, as torch.rot90
// turns the last two dimensions; its labels are k. With S' = S − 1, row i and column j:
//
//   y₀[i][j] = x[i][j]    y₁[i][j] = x[j][S'−i]    y₂[i][j] = x[S'−i][S'−j]    y₃[i][j] = x[S'−j][i]
//
// and for incoming gradients g of y, turned back and added in this order, in float32 at least:
//
//   dx[i][j] = (g₀[i][j] + g₂[S'−i][S'−j]) + (g₁[S'−j][i] + g₃[j][S'−i])
//
// Forward moves bytes and rounds nothing. Least memory traffic: one read and four writes of x; backward the reverse.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <tuple>

#include "csrc/common/cpu_dispatch.h"

namespace sslfast {

/// Memory of an image: planes × size × size pixels of `pixel` elements each. (C, S, S) has C planes and pixels of 1;
/// channels_last, (S, S, C), one plane of pixels of C.
struct Rotate4Params {
  c10::ScalarType dtype;
  int64_t images;  // n
  int64_t planes, size, pixel;
  int64_t image_stride;  // elements between images of x; those of y and of gradients lie side by side
  const void* in;        // forward: x; backward: g (4n images)
  void* out;             // forward: y (4n images); backward: dx
  int64_t* labels;       // forward, out: (4n)

  int64_t image_elements() const { return planes * size * size * pixel; }
};

SSLFAST_DECLARE_CPU_LAUNCHER(launch_rotate4_forward_cpu, Rotate4Params)
SSLFAST_DECLARE_CPU_LAUNCHER(launch_rotate4_backward_cpu, Rotate4Params)

/// images (n, C, S, S) → (y (4n, C, S, S) in the memory format of images, labels (4n) int64).
std::tuple<at::Tensor, at::Tensor> rotate4_forward(const at::Tensor& images);

/// grad (4n, C, S, S) → (n, C, S, S), in the memory format of grad.
at::Tensor rotate4_backward(const at::Tensor& grad);

}  // namespace sslfast
