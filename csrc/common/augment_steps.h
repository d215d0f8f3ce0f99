// The steps of the augmentation, as the tensor side, the CPU kernels and the CUDA kernels name them.
#pragma once

#include <cstdint>

namespace sslfast {

// The steps whose order is drawn per sample. Each has one parameter, and a value at which it does nothing.
enum AugmentStep : int8_t { kBrightness, kContrast, kSaturation, kHue, kGrayscale, kBlur, kSolarize, kAugmentSteps };

// A step that changes something.
struct ActiveStep {
  AugmentStep kind;
  float value;   // its drawn parameter
  float offset;  // contrast: (1 - factor) · mean grey, once that is known
};

constexpr int kMaxBlurRadius = 127;

}  // namespace sslfast
