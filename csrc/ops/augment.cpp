// The tensor side of the fused augmentation: drawing of its parameters, checks, and allocation.
#include "csrc/ops/augment.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <tuple>
#include <utility>

#include "csrc/common/check.h"
#include "csrc/common/philox.h"
#include "csrc/common/scratch.h"
#if defined(SSLFAST_WITH_CUDA)
#include "csrc/common/cuda_device.h"
#include "csrc/ops/cuda/augment_kernel.h"
#endif

namespace sslfast {
namespace {

// ---------------------------------------------------------------------------------------------------- drawing

enum AugmentNumber {
  kScaleMin,
  kScaleMax,
  kRatioMin,
  kRatioMax,
  kFlipP,
  kJitterP,
  kBrightnessMin,
  kBrightnessMax,
  kContrastMin,
  kContrastMax,
  kSaturationMin,
  kSaturationMax,
  kHueMin,
  kHueMax,
  kGrayscaleP,
  kBlurP,
  kSigmaMin,
  kSigmaMax,
  kSolarizeP,
  kSolarizeThreshold,
  kAugmentNumbers
};

// A sample's random blocks; 0 … 9 are the tries of the crop. Every quantity has its own words, so that switching one
// step off changes no other.
enum AugmentBlock : uint32_t { kCropTries = 10, kChoices = 16, kFactors = 17, kRest = 18 };

double between(double low, double high, uint32_t bits) { return low + (high - low) * uniform_double(bits); }

struct Crop {
  int32_t top, left, height, width;
};

// torchvision's RandomResizedCrop.get_params.
template <typename Draw>
Crop draw_crop(const std::vector<double>& n, int64_t height, int64_t width, const Draw& draw) {
  const double area = static_cast<double>(height) * width;
  const double log_ratio_min = std::log(n[kRatioMin]), log_ratio_max = std::log(n[kRatioMax]);
  for (uint32_t attempt = 0; attempt < kCropTries; ++attempt) {
    const Philox4 bits = draw(attempt);
    const double target = area * between(n[kScaleMin], n[kScaleMax], bits.word[0]);
    const double ratio = std::exp(between(log_ratio_min, log_ratio_max, bits.word[1]));
    const double w = std::nearbyint(std::sqrt(target * ratio)), h = std::nearbyint(std::sqrt(target / ratio));
    if (w >= 1 && w <= width && h >= 1 && h <= height) {
      return {static_cast<int32_t>(uniform_below(bits.word[2], static_cast<uint32_t>(height - h) + 1)),
              static_cast<int32_t>(uniform_below(bits.word[3], static_cast<uint32_t>(width - w) + 1)),
              static_cast<int32_t>(h), static_cast<int32_t>(w)};
    }
  }
  double w = width, h = height;  // the largest central crop whose ratio is allowed
  if (w / h < n[kRatioMin]) {
    h = std::max(1.0, std::nearbyint(w / n[kRatioMin]));
  } else if (w / h > n[kRatioMax]) {
    w = std::max(1.0, std::nearbyint(h * n[kRatioMax]));
  }
  return {static_cast<int32_t>((height - h) / 2), static_cast<int32_t>((width - w) / 2), static_cast<int32_t>(h),
          static_cast<int32_t>(w)};
}

// The steps in the view's order, with the four of the jitter (which stand together) permuted: `rank` picks one of 4!.
void draw_order(const std::vector<int64_t>& order, uint32_t rank, int8_t* out) {
  std::array<int8_t, 4> jitter{kBrightness, kContrast, kSaturation, kHue};
  const auto first = std::find(order.begin(), order.end(), kBrightness) - order.begin();
  for (size_t i = 0; i < order.size(); ++i) out[i] = static_cast<int8_t>(order[i]);
  for (uint32_t left = 4; left > 0; --left) {
    const uint32_t pick = rank % left;
    rank /= left;
    out[first + 4 - left] = jitter[pick];
    std::copy(jitter.begin() + pick + 1, jitter.end(), jitter.begin() + pick);
  }
}

// ---------------------------------------------------------------------------------------------------- checks

struct DrawSpec {
  const char* name;
  at::ScalarType dtype;
  int64_t last;  // length of a third dimension, or 0
};
constexpr std::array<DrawSpec, 10> kDraws{{{"crop", at::kInt, 4},
                                           {"flip", at::kBool, 0},
                                           {"order", at::kChar, kAugmentSteps},
                                           {"brightness", at::kFloat, 0},
                                           {"contrast", at::kFloat, 0},
                                           {"saturation", at::kFloat, 0},
                                           {"hue", at::kFloat, 0},
                                           {"grayscale", at::kBool, 0},
                                           {"sigma", at::kFloat, 0},
                                           {"solarize", at::kFloat, 0}}};

/// How many views the draws are of, after a look at their number, shapes, types and devices.
int64_t check_draws(const std::vector<at::Tensor>& draws, int64_t samples) {
  TORCH_CHECK_VALUE(draws.size() == kDraws.size(), "params: expected ", kDraws.size(), " tensors, got ", draws.size());
  check_dense(draws[0], "params.crop");
  const int64_t views = draws[0].dim() > 0 ? draws[0].size(0) : 0;
  for (size_t i = 0; i < kDraws.size(); ++i) {
    const DrawSpec& spec = kDraws[i];
    std::vector<int64_t> shape{views, samples};
    if (spec.last) shape.push_back(spec.last);
    check_dense(draws[i], spec.name);
    TORCH_CHECK_VALUE(draws[i].sizes() == at::IntArrayRef(shape), "params.", spec.name, ": expected shape ",
                      at::IntArrayRef(shape), " (views, images, …), got ", draws[i].sizes());
    TORCH_CHECK_TYPE(draws[i].scalar_type() == spec.dtype, "params.", spec.name, ": expected ", spec.dtype, ", got ",
                     draws[i].scalar_type());
    TORCH_CHECK_VALUE(draws[i].device().is_cpu(), "params.", spec.name, ": expected a CPU tensor, got ",
                      draws[i].device());
  }
  return views;
}

struct ImageSize {
  int64_t height, width;
};

// Everything that a kernel relies on, because parameters may have been edited.
void check_values(const AugmentForwardParams& p, const std::vector<ImageSize>& sizes) {
  const auto where = [&](int64_t task) {
    return c10::str(" (view ", task / p.samples, ", image ", task % p.samples, ")");
  };
  for (int64_t task = 0; task < p.views * p.samples; ++task) {
    const int32_t* c = p.crop + task * 4;
    const ImageSize size = sizes[task % p.samples];
    TORCH_CHECK_VALUE(c[0] >= 0 && c[1] >= 0 && c[2] >= 1 && c[3] >= 1 && int64_t{c[0]} + c[2] <= size.height &&
                          int64_t{c[1]} + c[3] <= size.width,
                      "params.crop: expected (top, left, height, width) inside the ", size.height, "×", size.width,
                      " image, got (", c[0], ", ", c[1], ", ", c[2], ", ", c[3], ")", where(task));
    uint32_t seen = 0;
    for (int i = 0; i < kAugmentSteps; ++i) {
      const int8_t step = p.order[task * kAugmentSteps + i];
      seen |= step >= 0 && step < kAugmentSteps ? 1u << step : 0u;
    }
    TORCH_CHECK_VALUE(seen == (1u << kAugmentSteps) - 1, "params.order: expected a permutation of 0 … ",
                      kAugmentSteps - 1, where(task));
    const auto check_range = [&](const float* values, const char* name, float low, float high, const char* expected) {
      TORCH_CHECK_VALUE(values[task] >= low && values[task] <= high, "params.", name, ": expected ", expected, ", got ",
                        values[task], where(task));
    };
    constexpr float kLargest = std::numeric_limits<float>::max();
    check_range(p.brightness, "brightness", 0.0f, kLargest, "a factor ≥ 0");
    check_range(p.contrast, "contrast", 0.0f, kLargest, "a factor ≥ 0");
    check_range(p.saturation, "saturation", 0.0f, kLargest, "a factor ≥ 0");
    check_range(p.hue, "hue", -0.5f, 0.5f, "a shift from -0.5 to 0.5");
    check_range(p.sigma, "sigma", 0.0f, kLargest, "0 (no blur) or a positive number");
    TORCH_CHECK_VALUE(!std::isnan(p.solarize[task]), "params.solarize: expected a threshold, got nan", where(task));
    TORCH_CHECK_VALUE(
        p.sigma[task] == 0.0f || (p.blur_radius < p.height && p.blur_radius < p.width),
        "kernel_size: the blur reflects at the border, so expected kernel_size // 2 below the output size ", p.height,
        "×", p.width, ", got ", 2 * p.blur_radius + 1);
  }
}

bool has_kernel(const at::Tensor& image) {
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(image)) return true;
#endif
  return image.is_cpu();
}

void check_images(const std::vector<at::Tensor>& images, bool batch, int64_t channel_dim) {
  TORCH_CHECK_VALUE(!images.empty(), "images: expected at least one image, got an empty list");
  for (size_t i = 0; i < images.size(); ++i) {
    const at::Tensor& image = images[i];
    const std::string name = batch ? "images" : c10::str("images[", i, "]");
    check_dim(image, batch ? 4 : 3, name.c_str());
    const int64_t channels = images[0].size(channel_dim);
    TORCH_CHECK_VALUE(has_kernel(image), name, ": expected a CPU or CUDA tensor, got ", image.device());
    TORCH_CHECK_VALUE(image.device() == images[0].device(), name, ": expected the device of the other images, ",
                      images[0].device(), ", got ", image.device());
    TORCH_CHECK_VALUE(image.scalar_type() == images[0].scalar_type(), name,
                      ": expected the dtype of the other images, ", images[0].scalar_type(), ", got ",
                      image.scalar_type());
    TORCH_CHECK_TYPE(image.scalar_type() == at::kByte || image.scalar_type() == at::kFloat, name,
                     ": expected uint8 (0 … 255) or float32 (0 … 1), got ", image.scalar_type());
    TORCH_CHECK_VALUE(channels == 1 || channels == 3, name, ": expected 1 or 3 channels, got shape ", image.sizes());
    TORCH_CHECK_VALUE(image.size(channel_dim) == channels, name, ": expected ", channels,
                      " channels like the first image, got shape ", image.sizes());
    TORCH_CHECK_VALUE(image.numel() > 0 || image.size(0) == 0, name, ": expected at least one pixel, got shape ",
                      image.sizes());
    // On a GPU the values are not looked at: that would wait for the device.
    if (image.scalar_type() == at::kFloat && image.numel() > 0 && image.is_cpu()) {
      const auto [low, high] = at::aminmax(image);
      const float smallest = low.item<float>(), largest = high.item<float>();
      TORCH_CHECK_VALUE(!(smallest < 0.0f || largest > 1.0f), name, ": expected float values in [0, 1], got ", smallest,
                        " … ", largest);
    }
  }
}

constexpr int64_t kMaxPixels =
    std::numeric_limits<int32_t>::max();  // of an output image, and height or width of an input

void check_output(int64_t height, int64_t width, int64_t kernel_size, int64_t channels, const std::vector<double>& mean,
                  const std::vector<double>& std, c10::ScalarType dtype) {
  TORCH_CHECK_VALUE(height >= 1 && width >= 1 && height <= kMaxPixels && width <= kMaxPixels / height,
                    "size: expected at least 1 and together at most ", kMaxPixels, " pixels, got ", height, "×", width);
  TORCH_CHECK_VALUE(kernel_size >= 1 && kernel_size % 2 == 1 && kernel_size / 2 <= kMaxBlurRadius,
                    "kernel_size: expected an odd number from 1 to ", 2 * kMaxBlurRadius + 1, ", got ", kernel_size);
  for (const auto* values : {&mean, &std})
    TORCH_CHECK_VALUE(static_cast<int64_t>(values->size()) == channels &&
                          std::all_of(values->begin(), values->end(), [](double x) { return std::isfinite(x); }),
                      "mean, std: expected ", channels, " finite numbers each, got ", *values);
  TORCH_CHECK_VALUE(std::all_of(std.begin(), std.end(), [](double x) { return x > 0; }),
                    "std: expected positive numbers, got ", std);
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "dtype: expected float32, bfloat16 or float16, got ", dtype);
}

/// What drawing relies on; the limits of probabilities and factors are those of AugmentDistribution in Python.
void check_distribution(const AugmentDistribution& view) {
  const auto& [n, order] = view;
  TORCH_CHECK_VALUE(
      n.size() == kAugmentNumbers && std::all_of(n.begin(), n.end(), [](double x) { return !std::isnan(x); }),
      "views: expected ", static_cast<int>(kAugmentNumbers), " numbers each, got ", n);
  TORCH_CHECK_VALUE(n[kScaleMin] > 0 && n[kScaleMin] <= n[kScaleMax] && n[kScaleMax] <= 1 && n[kRatioMin] > 0 &&
                        n[kRatioMin] <= n[kRatioMax] && std::isfinite(n[kRatioMax]),
                    "views: expected 0 < min ≤ max for scale and ratio, and scale of at most 1, got ", n);
  std::vector<int64_t> sorted(order);
  std::sort(sorted.begin(), sorted.end());
  bool permutation = sorted.size() == kAugmentSteps;
  for (size_t i = 0; i < sorted.size(); ++i) permutation &= sorted[i] == static_cast<int64_t>(i);
  const auto jitter = std::find(order.begin(), order.end(), kBrightness) - order.begin();
  for (int64_t i = 0; permutation && i < 4; ++i)
    permutation = jitter + 4 <= kAugmentSteps && order[jitter + i] == kBrightness + i;
  TORCH_CHECK_VALUE(permutation, "views: expected an order of the steps 0 … ", kAugmentSteps - 1,
                    " with those of the jitter side by side, got ", order);
}

// ---------------------------------------------------------------------------------------------------- output memory

// A fresh block of memory costs a page fault every 4 KiB when it is first written: at 224 pixels a quarter of the time.
// So the last blocks that outputs gave back are kept, and given out again. The locks are only tried: who does not get
// one (or was forked while it was held) takes the ordinary way.
struct KeptBlocks {
  static constexpr size_t kCount = 2;  // a loop holds the previous views while it makes the next
  static constexpr size_t kLargest = size_t{256} << 20;
  std::mutex mutex;
  std::array<std::pair<void*, size_t>, kCount> blocks{};
  size_t oldest = 0;
};
KeptBlocks& kept_blocks() {
  static auto* kept = new KeptBlocks;  // never destroyed: tensors may outlive static objects
  return *kept;
}

void* take_block(size_t bytes) {
  if (const std::unique_lock lock{kept_blocks().mutex, std::try_to_lock}) {
    for (auto& [block, size] : kept_blocks().blocks)
      if (block && size == bytes) return std::exchange(block, nullptr);
  }
  constexpr size_t kHugePage = size_t{2} << 20;
  void* block = nullptr;
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  TORCH_CHECK(posix_memalign(&block, alignment, bytes) == 0, "out of memory: augment needs ", bytes, " bytes");
#if defined(__linux__)
  if (bytes >= kHugePage) madvise(block, bytes, MADV_HUGEPAGE);
#endif
  return block;
}

void give_back_block(void* block, size_t bytes) {
  if (bytes <= KeptBlocks::kLargest) {
    KeptBlocks& kept = kept_blocks();
    if (const std::unique_lock lock{kept.mutex, std::try_to_lock}) {
      std::tie(block, std::ignore) = std::exchange(kept.blocks[kept.oldest], {block, bytes});
      kept.oldest = (kept.oldest + 1) % KeptBlocks::kCount;
    }
  }
  std::free(block);
}

at::Tensor new_output(at::IntArrayRef shape, at::ScalarType dtype) {
  const size_t bytes = c10::multiply_integers(shape) * c10::elementSize(dtype);
  const auto options = at::TensorOptions().dtype(dtype);
  if (bytes == 0) return at::empty(shape, options);
  const auto give_back = [bytes](void* block) { give_back_block(block, bytes); };
  return at::from_blob(take_block(bytes), shape, give_back, options);
}

// ---------------------------------------------------------------------------------------------------- CUDA

#if defined(SSLFAST_WITH_CUDA)
AugmentCudaTask cuda_task(const AugmentForwardParams& p, const std::vector<ImageSize>& sizes, int64_t index) {
  const AugmentImage& image = p.images[index % p.samples];
  const ImageSize size = sizes[index % p.samples];
  const int64_t elements = (size.height - 1) * image.row_stride + (size.width - 1) * image.column_stride +
                           (p.channels - 1) * image.channel_stride + 1;
  AugmentCudaTask task{};
  task.image = image.data;
  task.image_end = static_cast<const char*>(image.data) + elements * c10::elementSize(p.input_dtype);
  task.row_stride = image.row_stride;
  task.column_stride = image.column_stride;
  task.channel_stride = image.channel_stride;
  task.output = index;
  const int32_t* crop = p.crop + index * 4;
  task.crop_top = crop[0], task.crop_left = crop[1], task.crop_height = crop[2], task.crop_width = crop[3];
  task.flip = p.flip[index];
  ActiveStep steps[kAugmentSteps];
  const int count = active_steps(p, index, steps);
  for (int i = 0; i < count; ++i) {
    float weights[kMaxBlurRadius + 1];
    if (steps[i].kind == kBlur) task.blur_radius = gaussian_weights(p.blur_radius, steps[i].value, weights);
    if (steps[i].kind != kBlur || task.blur_radius > 0) task.steps[task.step_count++] = steps[i];
  }
  return task;
}

void forward_cuda(const AugmentForwardParams& p, const std::vector<ImageSize>& sizes, const at::Tensor& output) {
  const CudaScope scope(output);
  AugmentForwardCudaParams op{};
  op.channels = p.channels;
  op.bytes = p.input_dtype == at::kByte;
  op.height = p.height;
  op.width = p.width;
  op.interpolation = p.interpolation;
  op.antialias = p.antialias;
  std::copy_n(p.mean, 3, op.mean);
  std::copy_n(p.inverse_std, 3, op.inverse_std);
  op.output = output.mutable_data_ptr();
  op.output_type = p.output_dtype == at::kBFloat16 ? AugmentCudaOutput::bfloat16
                   : p.output_dtype == at::kHalf   ? AugmentCudaOutput::float16
                                                   : AugmentCudaOutput::float32;
  op.channels_last = p.channels_last;

  // Tasks that take the same way, and need about the same memory, go together.
  struct Group {
    AugmentCudaWay way;
    bool blurs;
    int max_radius;
    std::vector<AugmentCudaTask> tasks;
  };
  std::vector<Group> groups;
  for (int64_t i = 0; i < p.views * p.samples; ++i) {
    const AugmentCudaTask task = cuda_task(p, sizes, i);
    const AugmentCudaWay way = augment_cuda_way(op, task.blur_radius);
    const bool blurs = way == AugmentCudaWay::tiles && task.blur_radius > 0;
    auto group = std::find_if(groups.begin(), groups.end(), [&](auto& g) { return g.way == way && g.blurs == blurs; });
    if (group == groups.end()) group = groups.insert(group, {way, blurs, 0, {}});
    group->max_radius = std::max(group->max_radius, task.blur_radius);
    group->tasks.push_back(task);
  }
  for (const Group& group : groups) {
    const int64_t count = static_cast<int64_t>(group.tasks.size());
    const at::Tensor tasks = scope.upload(group.tasks.data(), count * static_cast<int64_t>(sizeof(AugmentCudaTask)));
    const at::Tensor workspace =
        at::empty({augment_cuda_workspace_bytes(op, group.way, count)}, output.options().dtype(at::kByte));
    launch_augment_forward_cuda(op, group.way, static_cast<const AugmentCudaTask*>(tasks.const_data_ptr()), count,
                                group.max_radius, workspace.mutable_data_ptr(), scope.stream());
  }
}
#endif

}  // namespace

AugmentDraws augment_draw(const at::Tensor& image_sizes, const at::Tensor& sample_ids,
                          const std::vector<AugmentDistribution>& views, uint64_t seed, int64_t epoch) {
  check_dim(sample_ids, 1, "sample_ids");
  check_dim(image_sizes, 2, "image_sizes");
  const int64_t samples = sample_ids.size(0), view_count = static_cast<int64_t>(views.size());
  TORCH_CHECK_VALUE(image_sizes.size(0) == samples && image_sizes.size(1) == 2, "image_sizes: expected shape [",
                    samples, ", 2], got ", image_sizes.sizes());
  for (const auto& [name, t] : {std::pair{"sample_ids", sample_ids}, std::pair{"image_sizes", image_sizes}})
    TORCH_CHECK_TYPE(t.scalar_type() == at::kLong && t.is_cpu(), name, ": expected int64 on cpu, got ", t.scalar_type(),
                     " on ", t.device());
  TORCH_CHECK_VALUE(epoch >= 0 && epoch <= std::numeric_limits<uint32_t>::max(), "epoch: expected 0 to 2^32 - 1, got ",
                    epoch);
  std::for_each(views.begin(), views.end(), check_distribution);
  const auto size_rows = image_sizes.contiguous(), id_rows = sample_ids.contiguous();
  std::vector<at::Tensor> draws;
  for (const DrawSpec& spec : kDraws) {
    std::vector<int64_t> shape{view_count, samples};
    if (spec.last) shape.push_back(spec.last);
    draws.push_back(at::empty(shape, at::TensorOptions().dtype(spec.dtype)));
  }
  const int64_t* sizes = size_rows.const_data_ptr<int64_t>();
  const int64_t* ids = id_rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < 2 * samples; ++i)
    TORCH_CHECK_VALUE(sizes[i] >= 1 && sizes[i] <= kMaxPixels, "image_sizes: expected 1 to ", kMaxPixels, ", got ",
                      sizes[i]);
  auto* crop = reinterpret_cast<Crop*>(draws[0].mutable_data_ptr<int32_t>());
  bool* flip = draws[1].mutable_data_ptr<bool>();
  int8_t* order = draws[2].mutable_data_ptr<int8_t>();
  float* brightness = draws[3].mutable_data_ptr<float>();
  float* contrast = draws[4].mutable_data_ptr<float>();
  float* saturation = draws[5].mutable_data_ptr<float>();
  float* hue = draws[6].mutable_data_ptr<float>();
  bool* grayscale = draws[7].mutable_data_ptr<bool>();
  float* sigma = draws[8].mutable_data_ptr<float>();
  float* solarize = draws[9].mutable_data_ptr<float>();

  at::parallel_for(0, view_count * samples, 256, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t view = task / samples, sample = task % samples;
      const std::vector<double>& n = views[view].first;
      const auto draw = [&](uint32_t block) {
        return philox_draw(seed, static_cast<uint64_t>(ids[sample]), static_cast<uint32_t>(epoch), kPhiloxAugment,
                           (static_cast<uint32_t>(view) << 8) | block);
      };
      const Philox4 choices = draw(kChoices), factors = draw(kFactors), rest = draw(kRest);
      const auto happens = [](double p, uint32_t bits) { return uniform_double(bits) < p; };
      const auto factor = [&](int low, uint32_t bits) { return static_cast<float>(between(n[low], n[low + 1], bits)); };
      const bool jitter = happens(n[kJitterP], choices.word[1]);
      crop[task] = draw_crop(n, sizes[2 * sample], sizes[2 * sample + 1], draw);
      flip[task] = happens(n[kFlipP], choices.word[0]);
      draw_order(views[view].second, uniform_below(rest.word[1], 24), order + task * kAugmentSteps);
      brightness[task] = jitter ? factor(kBrightnessMin, factors.word[0]) : 1.0f;
      contrast[task] = jitter ? factor(kContrastMin, factors.word[1]) : 1.0f;
      saturation[task] = jitter ? factor(kSaturationMin, factors.word[2]) : 1.0f;
      hue[task] = jitter ? factor(kHueMin, factors.word[3]) : 0.0f;
      grayscale[task] = happens(n[kGrayscaleP], choices.word[2]);
      sigma[task] = happens(n[kBlurP], choices.word[3]) ? factor(kSigmaMin, rest.word[2]) : 0.0f;
      solarize[task] = happens(n[kSolarizeP], rest.word[0]) ? static_cast<float>(n[kSolarizeThreshold])
                                                            : std::numeric_limits<float>::infinity();
    }
  });
  return {draws[0], draws[1], draws[2], draws[3], draws[4], draws[5], draws[6], draws[7], draws[8], draws[9]};
}

std::vector<uint32_t> philox4x32_words(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
  TORCH_CHECK_VALUE(counter.size() == 4 && key.size() == 2, "expected 4 words of counter and 2 of key");
  const Philox4 out = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {out.word, out.word + 4};
}

at::Tensor augment_forward(const std::vector<at::Tensor>& images, const std::vector<at::Tensor>& draws,
                           bool channels_first, int64_t height, int64_t width, const std::string& interpolation,
                           bool antialias, int64_t kernel_size, const std::vector<double>& mean,
                           const std::vector<double>& std, c10::ScalarType dtype, bool channels_last) {
  // Images: one pointer and three strides each. The kernel takes rows of any stride; anything else is made contiguous.
  const bool batch = images.size() == 1 && images[0].dim() == 4;
  const int64_t samples = batch ? images[0].size(0) : static_cast<int64_t>(images.size());
  const int64_t c = (batch ? 1 : 0) + (channels_first ? 0 : 2);
  const int64_t h = (batch ? 1 : 0) + (channels_first ? 1 : 0), w = h + 1;
  check_images(images, batch, c);
  const int64_t channels = images[0].size(c);
  check_output(height, width, kernel_size, channels, mean, std, dtype);
  TORCH_CHECK_VALUE(interpolation == "bilinear" || interpolation == "bicubic",
                    "interpolation: expected 'bilinear' or 'bicubic', got '", interpolation, "'");
  std::vector<at::Tensor> kept;
  std::vector<AugmentImage> sources;
  std::vector<ImageSize> sizes;
  sources.reserve(samples), sizes.reserve(samples);
  for (at::Tensor image : images) {
    const bool planar = image.stride(w) == 1, interleaved = image.stride(c) == 1 && image.stride(w) == channels;
    if (!planar && !interleaved) image = kept.emplace_back(image.contiguous());
    const int64_t copies = batch ? samples : 1, step = batch ? image.stride(0) * image.element_size() : 0;
    for (int64_t i = 0; i < copies; ++i) {
      sources.push_back({static_cast<const char*>(image.const_data_ptr()) + i * step, image.stride(h), image.stride(w),
                         image.stride(c)});
      sizes.push_back({image.size(h), image.size(w)});
    }
  }

  const int64_t views = check_draws(draws, samples);
  std::vector<at::Tensor> drawn;
  for (const at::Tensor& draw : draws) drawn.push_back(draw.contiguous());

  AugmentForwardParams p{};
  p.images = sources.data();
  p.input_dtype = images[0].scalar_type();
  p.channels = static_cast<int>(channels);
  p.views = views;
  p.samples = samples;
  p.crop = drawn[0].const_data_ptr<int32_t>();
  p.flip = drawn[1].const_data_ptr<bool>();
  p.order = drawn[2].const_data_ptr<int8_t>();
  p.brightness = drawn[3].const_data_ptr<float>();
  p.contrast = drawn[4].const_data_ptr<float>();
  p.saturation = drawn[5].const_data_ptr<float>();
  p.hue = drawn[6].const_data_ptr<float>();
  p.grayscale = drawn[7].const_data_ptr<bool>();
  p.sigma = drawn[8].const_data_ptr<float>();
  p.solarize = drawn[9].const_data_ptr<float>();
  p.height = static_cast<int>(height);
  p.width = static_cast<int>(width);
  p.interpolation = interpolation == "bicubic" ? kBicubic : kBilinear;
  p.antialias = antialias;
  p.blur_radius = static_cast<int>(kernel_size / 2);
  for (int64_t i = 0; i < channels; ++i) {
    p.mean[i] = static_cast<float>(mean[i]);
    p.inverse_std[i] = static_cast<float>(1.0 / std[i]);
  }
  p.output_dtype = dtype;
  p.channels_last = channels_last;
  check_values(p, sizes);

  for (int64_t task = 0; task < p.views * samples; ++task) {
    p.max_crop_height = std::max(p.max_crop_height, p.crop[task * 4 + 2]);
    p.max_crop_width = std::max(p.max_crop_width, p.crop[task * 4 + 3]);
  }
  const std::vector<int64_t> shape = channels_last ? std::vector<int64_t>{p.views, samples, height, width, channels}
                                                   : std::vector<int64_t>{p.views, samples, channels, height, width};
  const auto as_view = [&](const at::Tensor& output) {
    return channels_last ? output.permute({0, 1, 4, 2, 3}) : output;
  };
#if defined(SSLFAST_WITH_CUDA)
  if (is_cuda_tensor(images[0])) {
    const at::Tensor output = at::empty(shape, images[0].options().dtype(dtype));
    if (output.numel() > 0) forward_cuda(p, sizes, output);
    return as_view(output);
  }
#endif
  const at::Tensor output = as_view(new_output(shape, dtype));
  if (output.numel() == 0) return output;
  p.output = output.mutable_data_ptr();
  p.scratch_bytes = augment_scratch(p, nullptr).bytes;
  p.threads = thread_count();
  const at::Tensor scratch = at::empty({p.threads * p.scratch_bytes}, at::TensorOptions().dtype(at::kByte));
  p.scratch = reinterpret_cast<std::byte*>(scratch.mutable_data_ptr<uint8_t>());
  SSLFAST_CPU_DISPATCH(launch_augment_forward_cpu, p);
  return output;
}

}  // namespace sslfast
