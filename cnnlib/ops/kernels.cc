// Correlation and pooling of channels-last float32 maps on a CPU, called by XLA through its foreign function interface.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Span<const int64_t>;

namespace {

// As many values as a vector register holds, and as many rows of so many vectors as leave room for the operands.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int tile_rows(int vectors) { return vectors < 3 ? 14 : 9; }
#else
constexpr int kWidth = 8;
constexpr int tile_rows(int vectors) { return vectors < 3 ? 6 : 4; }
#endif
constexpr int kRows = tile_rows(1), kMostVectors = 3;
typedef float Vector __attribute__((vector_size(4 * kWidth), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * kWidth), may_alias));
// The same at any address, for arrays of floats. clang drops `aligned(4)` where arrays of vectors are passed by reference,
// so such arrays are of `Vector`.
typedef float Unaligned __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
static_assert(alignof(Vector) == sizeof(Vector) && alignof(Unaligned) == sizeof(float));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

// The sums of a weight gradient are made in as many parts at most, whatever the number of threads, each of so many
// positions at least: adding up a part costs what a few positions cost.
constexpr int kPartialSums = 16, kPartPositions = 256;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Runs work(0) ... work(chunks - 1), each once, on the caller and on XLA's threads. What a chunk throws, for want of
// memory, becomes an error of the whole, since no exception may leave one of XLA's threads.
template <typename Work>
ffi::Error parallel(ffi::ThreadPool& pool, int64_t chunks, Work work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
  };
  auto shared = std::make_shared<Shared>();
  // A helper that starts late finds nothing to do, so nobody waits for one that has not started: `work` is gone by then.
  auto drain = [shared, chunks, &work] {
    for (int64_t chunk; (chunk = shared->next.fetch_add(1)) < chunks;) {
      try {
        work(chunk);
      } catch (...) {
        shared->failed = true;
      }
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), chunks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([drain] { drain(); });
  drain();
  while (shared->done.load(std::memory_order_acquire) < chunks) std::this_thread::yield();
  if (shared->failed) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "a kernel of cnnlib ran out of memory");
  return ffi::Error::Success();
}

template <typename Work>
ffi::Error parallel_over_images(ffi::ThreadPool& pool, int64_t images, Work work) {
  const int64_t chunk_size = std::max<int64_t>(1, images / 32);
  return parallel(pool, (images + chunk_size - 1) / chunk_size, [&](int64_t chunk) {
    for (int64_t n = chunk * chunk_size; n < std::min(images, (chunk + 1) * chunk_size); ++n) work(n);
  });
}

// Calls work(vectors, first) for the tiles of a row: each of up to kMostVectors vectors, a constant, and where it begins.
template <typename Work>
void each_tile(int64_t row_size, Work work) {
  int64_t first = 0;
  for (int64_t left = (row_size + kWidth - 1) / kWidth; left > 0;) {
    if (left == 1) {
      work(std::integral_constant<int, 1>(), first), left -= 1;
    } else if (left == 3) {
      work(std::integral_constant<int, 3>(), first), left -= 3;
    } else {
      work(std::integral_constant<int, 2>(), first), left -= 2, first += 2 * kWidth;
    }
  }
}

// Places under the kernel that follow one another in the image and in the kernel: their offset from a position of the
// image, the row of the kernel that the first is multiplied by, and how many they are.
struct Run {
  int64_t offset, row, length;
};

// Positions of the output that meet the same taps, image after image of a block.
struct Phase {
  std::vector<int64_t> from;  // offsets into the block's padded images
  std::vector<int64_t> to;    // positions of the block's output
  std::vector<Run> runs;
  int64_t positions;  // of one image
};

// Max pooling of a map of (height, width, channel).
struct Pooling {
  int64_t height, width, channels, out_height, out_width;
  int64_t window[2], stride[2], low[2];
  std::vector<int64_t> taps;  // offsets of what is under a window that lies within the map

  Pooling(int64_t height, int64_t width, int64_t channels, int64_t out_height, int64_t out_width, Integers windows,
          Integers strides, Integers lows)
      : height(height), width(width), channels(channels), out_height(out_height), out_width(out_width) {
    for (int axis : {0, 1}) window[axis] = windows[axis], stride[axis] = strides[axis], low[axis] = lows[axis];
    for (int64_t h = 0; h < window[0]; ++h)
      for (int64_t w = 0; w < window[1]; ++w) taps.push_back((h * width + w) * channels);
  }

  // The rows (axis 0) or columns (axis 1) of the map under the window at a position.
  std::pair<int64_t, int64_t> under(int axis, int64_t position) const {
    const int64_t start = position * stride[axis] - low[axis], size = axis == 0 ? height : width;
    return {std::max<int64_t>(start, 0), std::min(start + window[axis], size)};
  }
  int64_t in_size() const { return height * width * channels; }
  int64_t out_size() const { return out_height * out_width * channels; }
  // Windows that lie side by side from the first value on meet no value twice.
  bool tiles() const {
    return stride[0] == window[0] && stride[1] == window[1] && low[0] == 0 && low[1] == 0 &&
           out_height * window[0] <= height && out_width * window[1] <= width;
  }

  // Calls see(output, place, taps, count) for every window: offsets of its result, of a value, and from there of what is
  // under it, all of channel 0.
  template <typename See>
  void each_window(See see) const {
    std::vector<int64_t> fewer(taps.size());
    for (int64_t i = 0; i < out_height; ++i) {
      const auto [top, bottom] = under(0, i);
      for (int64_t j = 0; j < out_width; ++j) {
        const auto [left, right] = under(1, j);
        const int64_t output = (i * out_width + j) * channels;
        if (bottom - top == window[0] && right - left == window[1]) {
          see(output, (top * width + left) * channels, taps.data(), int64_t(taps.size()));
          continue;
        }
        int64_t count = 0;
        for (int64_t h = top; h < bottom; ++h)
          for (int64_t w = left; w < right; ++w) fewer[count++] = (h * width + w) * channels;
        see(output, 0, fewer.data(), count);
      }
    }
  }
};

// `lanes` values from p on, and what follows or zeros after them; `end` is where the memory of p ends.
inline Vector load(const float* p, const float* end, int64_t lanes) {
  if (p + kWidth <= end) return load(p);
  Vector v = {};
  std::memcpy(&v, p, 4 * lanes);
  return v;
}
// The counterpart. Where there is room it overwrites what follows, which the caller fills in later.
inline void store(float* p, const float* end, int64_t lanes, Vector v) {
  if (p + kWidth <= end)
    store(p, v);
  else
    std::memcpy(p, &v, 4 * lanes);
}

// Calls work(taps) with the number of taps of a window: as a constant where it is usual, which unrolls loops over them.
template <typename Work>
inline void with_taps(int64_t count, Work work) {
  switch (count) {
    case 2: return work(std::integral_constant<int64_t, 2>());
    case 4: return work(std::integral_constant<int64_t, 4>());
    case 9: return work(std::integral_constant<int64_t, 9>());
    default: return work(count);
  }
}

// Pools a map. `winners`, where it is asked for, gets for each result one bit per tap that equals it, 31 taps at most.
void pool_map(const Pooling& p, const float* from, const float* from_end, float* to, float* winners) {
  const float *to_end = to + p.out_size(), *winners_end = winners + p.out_size();
  p.each_window([&](int64_t output, int64_t place, const int64_t* taps, int64_t tap_count) {
    with_taps(tap_count, [&](auto count) {
      for (int64_t c = 0; c < p.channels; c += kWidth) {
        const int64_t lanes = std::min<int64_t>(kWidth, p.channels - c);
        const float* under = from + place + c;
        Vector best = load(under + taps[0], from_end, lanes);
        for (int64_t t = 1; t < count; ++t) {
          const Vector v = load(under + taps[t], from_end, lanes);
          best = ((v > best) | (v != v)) ? v : best;  // what is not a number wins
        }
        store(to + output + c, to_end, lanes, best);
        if (!winners) continue;
        Bits bits = {};
        for (int64_t t = 0; t < count; ++t)
          bits |= (load(under + taps[t], from_end, lanes) == best) & (int32_t(1) << t);
        store(winners + output + c, winners_end, lanes, (Vector)bits);
      }
    });
  });
}

// Which taps of a window won, for a vector of channels: found by comparing, or by the bits that `pool_map` keeps.
struct ComparedWinners {
  const float *from, *from_end, *largest, *largest_end;
  Vector best;
  void begin(int64_t output, int64_t lanes) { best = load(largest + output, largest_end, lanes); }
  Bits won(int64_t, int64_t place, int64_t lanes) const { return load(from + place, from_end, lanes) == best; }
};
struct KeptWinners {
  const float *winners, *winners_end;
  Bits bits;
  void begin(int64_t output, int64_t lanes) { bits = (Bits)load(winners + output, winners_end, lanes); }
  Bits won(int64_t tap, int64_t, int64_t) const { return (bits & (int32_t(1) << tap)) != 0; }
};

// The gradient of each window goes to the values that won it, in equal shares. `to_end` is where its memory ends.
template <typename Winners>
void spread_map(const Pooling& p, Winners winners, const float* gradient, float* to, const float* to_end) {
  const float* gradient_end = gradient + p.out_size();
  alignas(Bits) int32_t first_lanes[2 * kWidth];
  for (int i = 0; i < 2 * kWidth; ++i) first_lanes[i] = i < kWidth ? -1 : 0;
  // Each winner's share, and zero in the lanes that belong to the next position.
  auto share = [&](int64_t output, int64_t place, const int64_t* taps, auto count, int64_t lanes) {
    Bits minus_count = {}, keep;
    winners.begin(output, lanes);
    for (int64_t t = 0; t < count; ++t) minus_count += winners.won(t, place + taps[t], lanes);
    const Vector each = load(gradient + output, gradient_end, lanes) / __builtin_convertvector(-minus_count, Vector);
    std::memcpy(&keep, first_lanes + kWidth - lanes, sizeof keep);
    return (Bits)each & keep;
  };
  if (!p.tiles() || (p.channels > kWidth && p.channels % kWidth != 0)) {
    std::fill(to, to + p.in_size(), 0.0f);
    p.each_window([&](int64_t output, int64_t place, const int64_t* taps, int64_t tap_count) {
      with_taps(tap_count, [&](auto count) {
        for (int64_t c = 0; c < p.channels; c += kWidth) {
          const int64_t lanes = std::min<int64_t>(kWidth, p.channels - c);
          const Bits each = share(output + c, place + c, taps, count, lanes);
          for (int64_t t = 0; t < count; ++t) {
            float* under = to + place + c + taps[t];
            const Vector more = (Vector)(winners.won(t, place + c + taps[t], lanes) & each);
            store(under, to_end, lanes, load(under, to_end, lanes) + more);
          }
        }
      });
    });
    return;
  }
  // Each value is written once. Where a vector writes beyond its lanes, row by row in the order of memory: what it writes
  // there comes later, or is zero.
  if (p.out_height * p.window[0] < p.height || p.out_width * p.window[1] < p.width)
    std::fill(to, to + p.in_size(), 0.0f);
  const int64_t downs = p.channels < kWidth ? p.window[0] : 1, taps_each = p.taps.size() / downs;
  with_taps(p.taps.size(), [&](auto count) {
    for (int64_t i = 0; i < p.out_height; ++i)
      for (int64_t down = 0; down < downs; ++down)
        for (int64_t j = 0; j < p.out_width; ++j) {
          const int64_t place = (i * p.window[0] * p.width + j * p.window[1]) * p.channels;
          for (int64_t c = 0; c < p.channels; c += kWidth) {
            const int64_t lanes = std::min<int64_t>(kWidth, p.channels - c);
            const Bits each = share((i * p.out_width + j) * p.channels + c, place + c, p.taps.data(), count, lanes);
            for (int64_t t = down * taps_each; t < (down + 1) * taps_each; ++t) {
              const int64_t under = place + c + p.taps[t];
              store(to + under, to_end, lanes, (Vector)(winners.won(t, under, lanes) & each));
            }
          }
        }
  });
}

// Where a kernel reads maps, and where it leaves its own: in XLA's memory, image after image of all lanes ...
struct Maps {
  const float* first;
  int64_t size;
  const float* images(int64_t image, int64_t, std::vector<float>&) const { return first + image * size; }
};
struct Results {
  float* first;
  int64_t size;
  float* room(int64_t image, int64_t, std::vector<float>&) const { return first + image * size; }
  void done(int64_t, int64_t, const std::vector<float>&) const {}
};
// ... or in the cache, where the memory has but what a pooling makes of them.
struct UnpooledMaps {
  Pooling pooling;
  const float *gradient, *winners;
  const float* images(int64_t image, int64_t count, std::vector<float>& scratch) const {
    scratch.resize(std::max<size_t>(scratch.size(), count * pooling.in_size() + kWidth));
    for (int64_t n = 0; n < count; ++n) {
      const float* won = winners + (image + n) * pooling.out_size();
      spread_map(pooling, KeptWinners{won, won + pooling.out_size(), {}}, gradient + (image + n) * pooling.out_size(),
                 scratch.data() + n * pooling.in_size(), scratch.data() + scratch.size());
    }
    return scratch.data();
  }
};
struct PooledResults {
  Pooling pooling;
  float *first, *winners;
  float* room(int64_t, int64_t count, std::vector<float>& scratch) const {
    scratch.resize(std::max<size_t>(scratch.size(), count * pooling.in_size() + kWidth));
    return scratch.data();
  }
  void done(int64_t image, int64_t count, const std::vector<float>& scratch) const {
    for (int64_t n = image; n < image + count; ++n)
      pool_map(pooling, scratch.data() + (n - image) * pooling.in_size(), scratch.data() + scratch.size(),
               first + n * pooling.out_size(), winners + n * pooling.out_size());
  }
};

// Where a kernel of (height, width) taps meets an image of (height, width, channels), and what it makes of it.
struct Geometry {
  int64_t height, width, channels;
  int64_t out_height, out_width, features;
  int64_t kernel_height, kernel_width;
  int64_t stride[2], low[2], x_dilation[2], kernel_dilation[2];
  // From a position's first tap to the first value of the image that it may meet; 0 unless the image is dilated.
  int64_t shift[2];
  // Neighbouring output columns that are computed as one position with more features.
  int64_t fold = 1;
  int64_t padded_height, padded_width;
  bool copies;

  Geometry(Integers x, Integers kernel, Integers y, Integers strides, Integers lows, Integers x_dilations,
           Integers kernel_dilations, bool folds = true)
      : height(x[2]), width(x[3]), channels(x[4]), out_height(y[2]), out_width(y[3]), features(y[4]),
        kernel_height(kernel[1]), kernel_width(kernel[2]) {
    for (int axis : {0, 1}) {
      stride[axis] = strides[axis];
      x_dilation[axis] = x_dilations[axis];
      kernel_dilation[axis] = kernel_dilations[axis];
      // The padding before the image in steps of its own, rounded up.
      low[axis] = lows[axis] > 0 ? (lows[axis] + x_dilation[axis] - 1) / x_dilation[axis] : lows[axis] / x_dilation[axis];
      shift[axis] = low[axis] * x_dilation[axis] - lows[axis];
    }
    if (folds) fold_columns();
    auto padded = [&](int axis, int64_t positions, int64_t taps) {
      return ((positions - 1) * stride[axis] + (taps - 1) * kernel_dilation[axis] + shift[axis]) / x_dilation[axis] + 1;
    };
    padded_height = padded(0, out_height, kernel_height);
    padded_width = padded(1, out_width, kernel_width);
    copies = low[0] != 0 || low[1] != 0 || padded_height > height || padded_width > width;
    if (!copies) padded_height = height, padded_width = width;
  }

  // Few features leave most of a vector empty. So `fold` neighbouring columns of the output, which are neighbours in
  // memory too, are taken as the features of one position, and the kernel widens by as many strides: it holds itself
  // once a column, shifted, among zeros. Chosen is the fold that takes the fewest cycles a column. One tap of one
  // position takes one for two vectors, since two are multiplied at a time; with a single vector in a row, loads take
  // two thirds of one.
  void fold_columns() {
    if (kernel_dilation[1] != 1) return;
    auto cycles = [&](int64_t columns) {
      const int64_t vectors = (columns * features + kWidth - 1) / kWidth;
      return (vectors == 1 ? 2.0 / 3 : vectors / 2.0) * (kernel_width + (columns - 1) * stride[1]) / columns;
    };
    int64_t best = 1;
    for (int64_t columns = 2; columns * features <= kMostVectors * kWidth; ++columns)
      if (out_width % columns == 0 && cycles(columns) < cycles(best)) best = columns;
    fold = best;
    kernel_width += (fold - 1) * stride[1];
    out_width /= fold;
    features *= fold;
    stride[1] *= fold;
  }

  int64_t image_size() const { return height * width * channels; }
  int64_t padded_size() const { return padded_height * padded_width * channels; }
  int64_t positions() const { return out_height * out_width; }
  int64_t rows() const { return kernel_height * kernel_width * channels; }
  // Of a kernel's row, and of a position of the gradient: that of the caller, but for less than a vector, which is packed
  // into one.
  int64_t row_size() const { return std::max<int64_t>(features, kWidth); }
  bool packs() const { return fold > 1 || features < kWidth; }
  // Where vectors of features begin. The last one reaches back over the one before it: what both compute is the same.
  // Where it is added to what is there, each has a place of its own, in rows of `spread_size`.
  template <int kVectors>
  std::array<int64_t, kVectors> vectors(int64_t feature) const {
    std::array<int64_t, kVectors> result;
    for (int v = 0; v < kVectors; ++v) result[v] = std::min<int64_t>(feature + v * kWidth, row_size() - kWidth);
    return result;
  }
  int64_t spread_size() const { return round_up(row_size(), kWidth); }
  int64_t spread(int64_t feature) const {
    return feature < row_size() / kWidth * kWidth ? feature : feature + spread_size() - row_size();
  }

  int64_t plain_kernel_size() const {
    return kernel_height * (kernel_width - (fold - 1) * stride[1] / fold) * channels * features / fold;
  }

  // Calls see(packed, plain) with the offsets of each run of features in a packed kernel and in the caller's.
  template <typename See>
  void each_run(See see) const {
    int64_t plain_features = features / fold, step = stride[1] / fold;
    int64_t plain_width = kernel_width - (fold - 1) * step;
    for (int64_t i = 0; i < kernel_height; ++i)
      for (int64_t column = 0; column < fold; ++column)
        for (int64_t j = 0; j < plain_width; ++j)
          for (int64_t c = 0; c < channels; ++c)
            see(((i * kernel_width + j + column * step) * channels + c) * row_size() + column * plain_features,
                ((i * plain_width + j) * channels + c) * plain_features);
  }

  // How many images, `most` at most, are taken together, so that their positions fill tiles with little waste.
  int64_t images_a_block(int64_t most) const {
    const int64_t rows = tile_rows(row_size() > 2 * kWidth && row_size() <= 3 * kWidth ? 3 : 2);
    const int64_t alike = std::max<int64_t>(1, positions() / (x_dilation[0] * x_dilation[1]));
    auto used = [&](int64_t images) { return double(images * alike) / round_up(images * alike, rows); };
    int64_t best = 1;
    for (int64_t images = 2; images <= most && images * alike <= 16 * kRows; ++images)
      if (used(images) > used(best)) best = images;
    return best;
  }

  // Every position of a block of images, with its taps. Between the values of a dilated image there is nothing to
  // multiply: positions fall into phases, by where they stand between two values, and a phase has the taps that meet one.
  std::vector<Phase> phases(int64_t images) const {
    std::vector<Phase> result;
    for (int64_t down = 0; down < x_dilation[0]; ++down)
      for (int64_t right = 0; right < x_dilation[1]; ++right) {
        Phase phase{};
        auto at = [&](int64_t i, int64_t j) {
          return (i / x_dilation[0] * padded_width + j / x_dilation[1]) * channels;
        };
        for (int64_t i = 0; i < out_height; ++i)
          for (int64_t j = 0; j < out_width; ++j) {
            const int64_t top = i * stride[0], left = j * stride[1];
            if (top % x_dilation[0] != down || left % x_dilation[1] != right) continue;
            phase.from.push_back(at(top, left));
            phase.to.push_back(i * out_width + j);
          }
        phase.positions = phase.to.size();
        if (phase.positions == 0) continue;
        phase.from.resize(images * phase.positions);
        phase.to.resize(images * phase.positions);
        for (int64_t n = phase.positions; n < images * phase.positions; ++n) {
          phase.from[n] = phase.from[n - phase.positions] + padded_size();
          phase.to[n] = phase.to[n - phase.positions] + positions();
        }
        for (int64_t r = 0; r < kernel_height; ++r)
          for (int64_t s = 0; s < kernel_width; ++s) {
            const int64_t top = down + r * kernel_dilation[0] + shift[0], left = right + s * kernel_dilation[1] + shift[1];
            if (top % x_dilation[0] != 0 || left % x_dilation[1] != 0) continue;
            const Run tap{at(top, left), (r * kernel_width + s) * channels, channels};
            Run* last = phase.runs.empty() ? nullptr : &phase.runs.back();
            if (last && tap.offset == last->offset + last->length && tap.row == last->row + last->length)
              last->length += channels;
            else
              phase.runs.push_back(tap);
          }
        result.push_back(std::move(phase));
      }
    return result;
  }

  // Images with their padding spelled out, in scratch that holds zeros elsewhere.
  const float* padded(const float* from, int64_t images, std::vector<float>& scratch) const {
    if (!copies) return from;
    scratch.resize(std::max<size_t>(scratch.size(), images * padded_size()));  // new elements are zero, and stay so
    const int64_t first = std::max<int64_t>(0, -low[1]), last = std::min(width, padded_width - low[1]);
    for (int64_t n = 0; n < images; ++n)
      for (int64_t i = std::max<int64_t>(0, -low[0]); i < std::min(height, padded_height - low[0]); ++i)
        if (first < last)
          std::memcpy(&scratch[n * padded_size() + ((i + low[0]) * padded_width + first + low[1]) * channels],
                      from + n * image_size() + (i * width + first) * channels, 4 * (last - first) * channels);
    return scratch.data();
  }

  // The part of a padded image that is the image itself.
  void unpadded(const float* from, float* to) const {
    const int64_t first = std::max<int64_t>(0, -low[1]), last = std::min(width, padded_width - low[1]);
    std::fill_n(to, image_size(), 0.0f);
    for (int64_t i = std::max<int64_t>(0, -low[0]); i < std::min(height, padded_height - low[0]); ++i)
      if (first < last)
        std::memcpy(to + (i * width + first) * channels, from + ((i + low[0]) * padded_width + first + low[1]) * channels,
                    4 * (last - first) * channels);
  }
};

// tile_rows positions by kVectors vectors of output channels, held in registers over all taps and input channels.
template <int kVectors>
__attribute__((noinline)) void forward_block(const Geometry& g, const float* images, const Phase& phase, int64_t count, const float* kernel,
                   int64_t feature, float* y) {
  constexpr int kTile = tile_rows(kVectors);
  const auto vector = g.vectors<kVectors>(feature);
  const int64_t kernel_row = g.row_size();
  for (int64_t start = 0; start < count; start += kTile) {
    const float* from[kTile];
    for (int r = 0; r < kTile; ++r) from[r] = images + phase.from[std::min<int64_t>(start + r, count - 1)];
    Vector sum[kTile][kVectors] = {};
    for (auto [offset, row, length] : phase.runs) {
      const float* weights = kernel + row * kernel_row;
      for (int64_t c = offset; c < offset + length; ++c, weights += kernel_row) {
        Vector k[kVectors];
        for (int v = 0; v < kVectors; ++v) k[v] = load(weights + vector[v]);
#pragma GCC unroll 16
        for (int r = 0; r < kTile; ++r) {
          float x = from[r][c];
          for (int v = 0; v < kVectors; ++v) sum[r][v] += x * k[v];
        }
      }
    }
    int rows = std::min<int64_t>(kTile, count - start);
    for (int r = 0; r < rows; ++r) {
      float* to = y + phase.to[start + r] * g.features;
      if (g.features < kWidth)
        std::memcpy(to, sum[r], 4 * g.features);
      else
        for (int v = 0; v < kVectors; ++v) store(to + vector[v], sum[r][v]);
    }
  }
}

// kTile rows of the kernel by kVectors of output channels, over `count` positions.
template <int kTile, int kVectors>
void gradient_tile(const Geometry& g, const float* images, const Phase& phase, int64_t count, const float* gradient,
                   int64_t feature, float* sums) {
  const auto vector = g.vectors<kVectors>(feature);
  const int64_t row_size = g.row_size(), sums_size = g.spread_size();
  sums += feature;
  Vector s[kTile][kVectors];
  for (int r = 0; r < kTile; ++r)
    for (int v = 0; v < kVectors; ++v) s[r][v] = load(sums + r * sums_size + v * kWidth);
  for (int64_t p = 0; p < count; ++p) {
    const float *x = images + phase.from[p], *from = gradient + phase.to[p] * row_size;
    Vector y[kVectors];
    for (int v = 0; v < kVectors; ++v) y[v] = load(from + vector[v]);
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
      for (int v = 0; v < kVectors; ++v) s[r][v] += x[r] * y[v];
  }
  for (int r = 0; r < kTile; ++r)
    for (int v = 0; v < kVectors; ++v) store(sums + r * sums_size + v * kWidth, s[r][v]);
}

using GradientTile = void (*)(const Geometry&, const float*, const Phase&, int64_t, const float*, int64_t, float*);
template <int kVectors, int... kTiles>
GradientTile gradient_tile_of(int tile, std::integer_sequence<int, kTiles...>) {
  static const GradientTile table[] = {gradient_tile<kTiles + 1, kVectors>...};
  return table[tile - 1];
}

// y[l, n] = the correlation of x[l, n] with kernel[l], for `batch` images per lane.
template <typename Source, typename Sink>
ffi::Error correlate(ffi::ThreadPool& pool, const Geometry& g, int64_t lanes, int64_t batch, Source x,
                     const float* kernel, Sink y) {
  const int64_t kernel_size = g.rows() * g.row_size(), plain_size = g.plain_kernel_size();
  const float* packed = kernel;
  std::vector<float> storage;
  if (g.packs()) {
    storage.resize(lanes * kernel_size);
    for (int64_t lane = 0; lane < lanes; ++lane)
      g.each_run([&](int64_t to, int64_t from) {
        std::memcpy(&storage[lane * kernel_size + to], kernel + lane * plain_size + from, 4 * g.features / g.fold);
      });
    packed = storage.data();
  }
  const int64_t block = g.images_a_block(batch);
  const auto phases = g.phases(block);
  const int64_t chunk_size = round_up(std::max<int64_t>(1, batch / 32), block);
  const int64_t chunks = (batch + chunk_size - 1) / chunk_size;
  return parallel(pool, lanes * chunks, [&](int64_t chunk) {
    std::vector<float> maps, padded, results;
    const int64_t lane = chunk / chunks, end = std::min(batch, (chunk % chunks + 1) * chunk_size);
    const float* k = packed + lane * kernel_size;
    for (int64_t n = chunk % chunks * chunk_size; n < end; n += block) {
      const int64_t count = std::min(block, end - n), image = lane * batch + n;
      const float* images = g.padded(x.images(image, count, maps), count, padded);
      float* to = y.room(image, count, results);
      for (const Phase& phase : phases)
        each_tile(g.row_size(), [&](auto vectors, int64_t feature) {
          forward_block<vectors()>(g, images, phase, count * phase.positions, k, feature, to);
        });
      y.done(image, count, results);
    }
  });
}

// result[l] = the sum over images of x[l, n], shifted by each tap, times gradient[l, n].
template <typename Source>
ffi::Error kernel_gradient(ffi::ThreadPool& pool, const Geometry& g, int64_t lanes, int64_t batch, const float* x,
                           Source gradient, float* result) {
  const int64_t row_size = g.row_size(), sums_size = g.spread_size(), kernel_size = g.rows() * sums_size;
  // As many partial sums whatever the machine, added in order: the result depends on neither threads nor timing.
  const int64_t parts = std::clamp<int64_t>(batch * g.positions() / kPartPositions, 1, kPartialSums);
  const int64_t chunk_size = (batch + parts - 1) / parts, chunks = (batch + chunk_size - 1) / chunk_size;
  const int64_t block = std::min(chunk_size, std::max<int64_t>(1, 16 * kRows / g.positions()));
  const auto phases = g.phases(block);
  std::vector<float> partial(lanes * chunks * kernel_size);
  ffi::Error error = parallel(pool, lanes * chunks, [&](int64_t chunk) {
    std::vector<float> maps, padded, wide;
    if (g.features < kWidth) wide.resize(block * g.positions() * row_size);
    const int64_t lane = chunk / chunks, end = std::min(batch, (chunk % chunks + 1) * chunk_size);
    for (int64_t n = chunk % chunks * chunk_size; n < end; n += block) {
      const int64_t count = std::min(block, end - n), image = lane * batch + n;
      const float* images = g.padded(x + image * g.image_size(), count, padded);
      const float* from = gradient.images(image, count, maps);
      if (g.features < kWidth) {
        for (int64_t p = 0; p < count * g.positions(); ++p)
          std::memcpy(&wide[p * row_size], from + p * g.features, 4 * g.features);
        from = wide.data();
      }
      each_tile(row_size, [&](auto vectors, int64_t feature) {
        constexpr int kMost = tile_rows(vectors());
        const auto sizes = std::make_integer_sequence<int, kMost>();
        for (const Phase& phase : phases)
          for (auto [offset, row, length] : phase.runs)
            for (int64_t tile = 0, tiles = (length + kMost - 1) / kMost; tile < tiles; ++tile) {
              const int64_t start = length * tile / tiles, size = length * (tile + 1) / tiles - start;  // nearly equal
              gradient_tile_of<vectors()>(size, sizes)(g, images + offset + start, phase, count * phase.positions, from,
                                                       feature, &partial[chunk * kernel_size + (row + start) * sums_size]);
            }
      });
    }
  });
  if (error.failure()) return error;
  const int64_t plain_size = g.plain_kernel_size();
  for (int64_t lane = 0; lane < lanes; ++lane) {
    float *sum = &partial[lane * chunks * kernel_size], *plain = result + lane * plain_size;
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < kernel_size; ++i) sum[i] += sum[chunk * kernel_size + i];
    std::fill_n(plain, plain_size, 0.0f);
    g.each_run([&](int64_t packed, int64_t first) {
      const float* row = sum + packed / row_size * sums_size;
      for (int64_t f = 0; f < g.features / g.fold; ++f) plain[first + f] += row[g.spread(packed % row_size + f)];
    });
  }
  return ffi::Error::Success();
}

// Adds products of gradients and kernel rows to what is in a padded image: kVectors vectors of a row of the kernel, which
// is (feature, row_size), at tile_rows positions at a time. Those are far from each other, as what is stored to a place
// can be loaded again only after a while.
template <int kVectors>
__attribute__((noinline)) void scatter_block(const float* gradient, const int64_t* from, const int64_t* to, int64_t count, int64_t features,
                   const float* kernel, int64_t row_size, float* padded) {
  constexpr int kTile = tile_rows(kVectors);
  const int64_t tiles = (count + kTile - 1) / kTile;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    int64_t position[kTile];
    const float* at[kTile];
    for (int r = 0; r < kTile; ++r) {
      position[r] = tile + r * tiles;
      at[r] = gradient + from[std::min(position[r], count - 1)];
    }
    Vector sum[kTile][kVectors] = {};
    const float* weights = kernel;
    for (int64_t f = 0; f < features; ++f, weights += row_size) {
      Vector k[kVectors];
      for (int v = 0; v < kVectors; ++v) k[v] = load(weights + v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        float y = at[r][f];
        for (int v = 0; v < kVectors; ++v) sum[r][v] += y * k[v];
      }
    }
    for (int r = 0; r < kTile; ++r) {
      if (position[r] >= count) continue;
      float* place = padded + to[position[r]];
      for (int v = 0; v < kVectors; ++v) store(place + v * kWidth, load(place + v * kWidth) + sum[r][v]);
    }
  }
}

// result[l, n] = what each value of the input gets from the gradients of the positions that see it, by scattering each
// position's gradient over its window. Taps that are neighbours in the image are one row of the kernel.
template <typename Source>
ffi::Error scatter(ffi::ThreadPool& pool, const Geometry& g, int64_t lanes, int64_t batch, Source gradient,
                   const float* kernel, float* result) {
  const int64_t joined = g.kernel_dilation[1] == 1 ? g.kernel_width : 1;
  const int64_t length = joined * g.channels, row_size = round_up(length, kWidth);
  const int64_t rows = g.kernel_height * (g.kernel_width / joined), row_weights = g.features * row_size;
  std::vector<float> packed(lanes * rows * row_weights);  // (lane, row, feature, place in the row)
  for (int64_t row = 0; row < lanes * rows; ++row)
    for (int64_t i = 0; i < length; ++i)
      for (int64_t f = 0; f < g.features; ++f)
        packed[row * row_weights + f * row_size + i] = kernel[(row * length + i) * g.features + f];
  const int64_t block = g.images_a_block(batch), positions = g.positions();
  std::vector<int64_t> from(block * positions), to(block * positions), tap(rows);
  for (int64_t p = 0; p < block * positions; ++p) {
    const int64_t i = p % positions / g.out_width, j = p % g.out_width;
    from[p] = p * g.features;
    to[p] = p / positions * g.padded_size() + (i * g.stride[0] * g.padded_width + j * g.stride[1]) * g.channels;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t r = row * joined / g.kernel_width, s = row * joined % g.kernel_width;
    tap[row] = (r * g.kernel_dilation[0] * g.padded_width + s * g.kernel_dilation[1]) * g.channels;
  }
  const int64_t chunk_size = round_up(std::max<int64_t>(1, batch / 32), block);
  const int64_t chunks = (batch + chunk_size - 1) / chunk_size;
  return parallel(pool, lanes * chunks, [&](int64_t chunk) {
    std::vector<float> maps, padded(block * g.padded_size() + row_size);
    const int64_t lane = chunk / chunks, end = std::min(batch, (chunk % chunks + 1) * chunk_size);
    for (int64_t n = chunk % chunks * chunk_size; n < end; n += block) {
      const int64_t count = std::min(block, end - n), image = lane * batch + n;
      const float* images = gradient.images(image, count, maps);
      std::fill(padded.begin(), padded.end(), 0.0f);
      for (int64_t row = 0; row < rows; ++row)
        each_tile(row_size, [&](auto vectors, int64_t first) {
          scatter_block<vectors()>(images, from.data(), to.data(), count * positions, g.features,
                                   &packed[(lane * rows + row) * row_weights + first], row_size,
                                   &padded[tap[row] + first]);
        });
      for (int64_t i = 0; i < count; ++i)
        g.unpadded(&padded[i * g.padded_size()], result + (image + i) * g.image_size());
    }
  });
}

// What XLA calls. Shapes: x (lane, image, height, width, channel), kernel (lane, height, width, channel, feature), y and
// gradient (lane, image, row, column, feature). Where a pooling follows, gradient and winners have its shape.

ffi::Error Correlate(ffi::ThreadPool pool, Floats x, Floats kernel, ffi::ResultBuffer<ffi::F32> y, Integers strides,
                     Integers low, Integers x_dilation, Integers kernel_dilation) {
  const Geometry g(x.dimensions(), kernel.dimensions(), y->dimensions(), strides, low, x_dilation, kernel_dilation);
  return correlate(pool, g, x.dimensions()[0], x.dimensions()[1], Maps{x.typed_data(), g.image_size()},
                   kernel.typed_data(), Results{y->typed_data(), g.positions() * g.features});
}

// With the sizes of the maps between correlation and pooling, and the pooling.
#define POOLING_PARAMETERS Integers size, Integers window, Integers pool_strides, Integers pool_low
std::vector<int64_t> map_shape(Integers pooled, Integers size) {
  return {pooled[0], pooled[1], size[0], size[1], pooled[4]};
}
Pooling pooling_of(Integers pooled, POOLING_PARAMETERS) {
  return Pooling(size[0], size[1], pooled[4], pooled[2], pooled[3], window, pool_strides, pool_low);
}
UnpooledMaps unpooled(Floats gradient, ffi::Buffer<ffi::S32> winners, POOLING_PARAMETERS) {
  return {pooling_of(gradient.dimensions(), size, window, pool_strides, pool_low), gradient.typed_data(),
          reinterpret_cast<const float*>(winners.typed_data())};
}

ffi::Error CorrelatePooled(ffi::ThreadPool pool, Floats x, Floats kernel, ffi::ResultBuffer<ffi::F32> y,
                           ffi::ResultBuffer<ffi::S32> winners, Integers strides, Integers low, Integers x_dilation,
                           Integers kernel_dilation, POOLING_PARAMETERS) {
  const auto shape = map_shape(y->dimensions(), size);
  const Geometry g(x.dimensions(), kernel.dimensions(), shape, strides, low, x_dilation, kernel_dilation);
  const PooledResults results{pooling_of(y->dimensions(), size, window, pool_strides, pool_low), y->typed_data(),
                              reinterpret_cast<float*>(winners->typed_data())};
  return correlate(pool, g, shape[0], shape[1], Maps{x.typed_data(), g.image_size()}, kernel.typed_data(), results);
}

ffi::Error CorrelateUnpooled(ffi::ThreadPool pool, Floats gradient, Floats kernel, ffi::Buffer<ffi::S32> winners,
                             ffi::ResultBuffer<ffi::F32> y, Integers strides, Integers low, Integers x_dilation,
                             Integers kernel_dilation, POOLING_PARAMETERS) {
  const auto shape = map_shape(gradient.dimensions(), size);
  const Geometry g(shape, kernel.dimensions(), y->dimensions(), strides, low, x_dilation, kernel_dilation);
  return correlate(pool, g, shape[0], shape[1], unpooled(gradient, winners, size, window, pool_strides, pool_low),
                   kernel.typed_data(), Results{y->typed_data(), g.positions() * g.features});
}

ffi::Error KernelGradient(ffi::ThreadPool pool, Floats x, Floats gradient, ffi::ResultBuffer<ffi::F32> result,
                          Integers strides, Integers low, Integers x_dilation, Integers kernel_dilation) {
  const Geometry g(x.dimensions(), result->dimensions(), gradient.dimensions(), strides, low, x_dilation,
                   kernel_dilation);
  return kernel_gradient(pool, g, x.dimensions()[0], x.dimensions()[1], x.typed_data(),
                         Maps{gradient.typed_data(), g.positions() * g.features}, result->typed_data());
}

ffi::Error KernelGradientUnpooled(ffi::ThreadPool pool, Floats x, Floats gradient, ffi::Buffer<ffi::S32> winners,
                                  ffi::ResultBuffer<ffi::F32> result, Integers strides, Integers low,
                                  Integers x_dilation, Integers kernel_dilation, POOLING_PARAMETERS) {
  const auto shape = map_shape(gradient.dimensions(), size);
  const Geometry g(x.dimensions(), result->dimensions(), shape, strides, low, x_dilation, kernel_dilation);
  return kernel_gradient(pool, g, shape[0], shape[1], x.typed_data(),
                         unpooled(gradient, winners, size, window, pool_strides, pool_low), result->typed_data());
}

ffi::Error Scatter(ffi::ThreadPool pool, Floats gradient, Floats kernel, ffi::ResultBuffer<ffi::F32> x,
                   Integers strides, Integers low, Integers x_dilation, Integers kernel_dilation) {
  const Geometry g(x->dimensions(), kernel.dimensions(), gradient.dimensions(), strides, low, x_dilation,
                   kernel_dilation, false);
  return scatter(pool, g, x->dimensions()[0], x->dimensions()[1], Maps{gradient.typed_data(), g.positions() * g.features},
                 kernel.typed_data(), x->typed_data());
}

ffi::Error ScatterUnpooled(ffi::ThreadPool pool, Floats gradient, Floats kernel, ffi::Buffer<ffi::S32> winners,
                           ffi::ResultBuffer<ffi::F32> x, Integers strides, Integers low, Integers x_dilation,
                           Integers kernel_dilation, POOLING_PARAMETERS) {
  const auto shape = map_shape(gradient.dimensions(), size);
  const Geometry g(x->dimensions(), kernel.dimensions(), shape, strides, low, x_dilation, kernel_dilation, false);
  return scatter(pool, g, shape[0], shape[1], unpooled(gradient, winners, size, window, pool_strides, pool_low),
                 kernel.typed_data(), x->typed_data());
}

ffi::Error MaxPool(ffi::ThreadPool pool, Floats x, ffi::ResultBuffer<ffi::F32> y, Integers window, Integers strides,
                   Integers low) {
  const auto in = x.dimensions(), out = y->dimensions();
  const Pooling p(in[1], in[2], in[3], out[1], out[2], window, strides, low);
  return parallel_over_images(pool, in[0], [&](int64_t n) {
    const float* from = x.typed_data() + n * p.in_size();
    pool_map(p, from, from + p.in_size(), y->typed_data() + n * p.out_size(), nullptr);
  });
}

ffi::Error MaxPoolGradient(ffi::ThreadPool pool, Floats x, Floats y, Floats gradient, ffi::ResultBuffer<ffi::F32> result,
                           Integers window, Integers strides, Integers low) {
  const auto in = x.dimensions(), out = y.dimensions();
  const Pooling p(in[1], in[2], in[3], out[1], out[2], window, strides, low);
  return parallel_over_images(pool, in[0], [&](int64_t n) {
    const float *from = x.typed_data() + n * p.in_size(), *largest = y.typed_data() + n * p.out_size();
    float* to = result->typed_data() + n * p.in_size();
    spread_map(p, ComparedWinners{from, from + p.in_size(), largest, largest + p.out_size(), {}},
               gradient.typed_data() + n * p.out_size(), to, to + p.in_size());
  });
}

// A local layer: a correlation whose kernel is another one at every position of the output. Each weight meets as many
// values as there are images, so these stand side by side: maps are turned, `(height, width, channel, image)`, and
// every vector is full whatever the number of channels.
struct LocalGeometry {
  int64_t images, row_size;  // how many, and the length of their row in a turned map, whole vectors of kImageVector
  int64_t height, width, channels, out_height, out_width, features, kernel_height, kernel_width;
  int64_t stride[2], low[2], dilation[2];

  static constexpr int64_t kImageVector = 16;

  LocalGeometry(Integers x, Integers kernel, Integers strides, Integers lows, Integers dilations)
      : images(x[1]), row_size(round_up(x[1], kImageVector)), height(x[2]), width(x[3]), channels(x[4]),
        out_height(kernel[1]), out_width(kernel[2]), features(kernel[6]), kernel_height(kernel[3]),
        kernel_width(kernel[4]) {
    for (int axis : {0, 1}) {
      stride[axis] = strides[axis];
      low[axis] = lows[axis];
      dilation[axis] = dilations[axis];
    }
  }

  int64_t in_size() const { return height * width * channels; }
  int64_t out_size() const { return out_height * out_width * features; }
  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t kernel_size() const { return out_height * out_width * taps() * channels * features; }

  // Calls see(tap, place) for each tap of position (i, j) that is on the map, where it finds the place.
  template <typename See>
  void each_tap(int64_t i, int64_t j, See see) const {
    for (int64_t r = 0; r < kernel_height; ++r)
      for (int64_t s = 0; s < kernel_width; ++s) {
        int64_t h = i * stride[0] - low[0] + r * dilation[0], w = j * stride[1] - low[1] + s * dilation[1];
        if (h >= 0 && h < height && w >= 0 && w < width) see(r * kernel_width + s, h * width + w);
      }
  }

  // Calls see(position, tap) for each position that has place (h, w) under a tap.
  template <typename See>
  void each_position(int64_t h, int64_t w, See see) const {
    for (int64_t r = 0; r < kernel_height; ++r)
      for (int64_t s = 0; s < kernel_width; ++s) {
        int64_t i = h + low[0] - r * dilation[0], j = w + low[1] - s * dilation[1];
        if (i < 0 || j < 0 || i % stride[0] != 0 || j % stride[1] != 0) continue;
        i /= stride[0], j /= stride[1];
        if (i < out_height && j < out_width) see(i * out_width + j, r * kernel_width + s);
      }
  }
};

// Turns columns of a matrix (images, size) into rows (count, row_size), zeros in place of missing images; and back.
void turn(const float* from, int64_t images, int64_t size, int64_t first, int64_t count, float* to, int64_t row_size) {
  for (int64_t n0 = 0; n0 < row_size; n0 += 16)
    for (int64_t c0 = 0; c0 < count; c0 += 16)
      for (int64_t c = c0; c < std::min(count, c0 + 16); ++c)
        for (int64_t n = n0; n < n0 + 16; ++n) to[c * row_size + n] = n < images ? from[n * size + first + c] : 0.0f;
}
void turn_back(const float* from, int64_t row_size, int64_t images, int64_t size, int64_t first, int64_t count,
               float* to) {
  for (int64_t n0 = 0; n0 < images; n0 += 16)
    for (int64_t c0 = 0; c0 < count; c0 += 16)
      for (int64_t n = n0; n < std::min(images, n0 + 16); ++n)
        for (int64_t c = c0; c < std::min(count, c0 + 16); ++c) to[n * size + first + c] = from[c * row_size + n];
}
ffi::Error turn_all(ffi::ThreadPool& pool, const float* from, int64_t images, int64_t size, float* to,
                    int64_t row_size) {
  const int64_t chunk = 64;
  return parallel(pool, (size + chunk - 1) / chunk, [&](int64_t n) {
    turn(from, images, size, n * chunk, std::min(chunk, size - n * chunk), to + n * chunk * row_size, row_size);
  });
}

// A turned row, and the first of the weights that it is multiplied by.
struct Term {
  const float* row;
  const float* weights;
};

// sums[i] = the sum over terms of weights[i * step] times the row, kSums rows by kVectors vectors in registers.
template <int kSums, int kVectors>
void weighted_tile(const std::vector<Term>& terms, int64_t image, int64_t first, int64_t step, float* sums,
                   int64_t row_size) {
  Vector s[kSums][kVectors] = {};
  for (const Term& term : terms) {
    Vector x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(term.row + image + v * kWidth);
    const float* weight = term.weights + first * step;
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) {
      float w = weight[i * step];
      for (int v = 0; v < kVectors; ++v) s[i][v] += w * x[v];
    }
  }
  for (int i = 0; i < kSums; ++i)
    for (int v = 0; v < kVectors; ++v) store(sums + (first + i) * row_size + image + v * kWidth, s[i][v]);
}

constexpr int kSumVectors = kWidth == 16 ? 4 : 2, kSums = kWidth == 16 ? 6 : 4;

using WeightedTile = void (*)(const std::vector<Term>&, int64_t, int64_t, int64_t, float*, int64_t);
template <int kVectors, int... kCounts>
WeightedTile weighted_tile_of(int64_t count, std::integer_sequence<int, kCounts...>) {
  static const WeightedTile table[] = {weighted_tile<kCounts + 1, kVectors>...};
  return table[count - 1];
}

// All `count` rows of sums over all images.
void weighted_rows(const std::vector<Term>& terms, int64_t count, int64_t step, float* sums, int64_t row_size) {
  const auto counts = std::make_integer_sequence<int, kSums>{};
  const int64_t tiles = (count + kSums - 1) / kSums;
  for (int64_t image = 0; image < row_size;) {
    const bool whole = row_size - image >= kSumVectors * kWidth;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = count * tile / tiles, size = count * (tile + 1) / tiles - first;  // nearly equal
      (whole ? weighted_tile_of<kSumVectors>(size, counts) : weighted_tile_of<1>(size, counts))(
          terms, image, first, step, sums, row_size);
    }
    image += (whole ? kSumVectors : 1) * kWidth;
  }
}

// The sum of a vector's values.
inline float total(Vector v) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad sum = {};
  for (int part = 0; part < kWidth / 4; ++part) {
    Quad quad;
    std::memcpy(&quad, reinterpret_cast<const char*>(&v) + 16 * part, 16);
    sum += quad;
  }
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// products[r][f] = the product of row r with column row f, summed over images; kRowTile by kColumnTile of them.
template <int kRowTile, int kColumnTile>
void product_tile(const float* const* rows, const float* columns, int64_t row_size, float* const* products) {
  Vector s[kRowTile][kColumnTile] = {};
  for (int64_t n = 0; n < row_size; n += kWidth) {
    Vector x[kRowTile];
    for (int r = 0; r < kRowTile; ++r) x[r] = load(rows[r] + n);
#pragma GCC unroll 8
    for (int f = 0; f < kColumnTile; ++f) {
      Vector g = load(columns + f * row_size + n);
      for (int r = 0; r < kRowTile; ++r) s[r][f] += x[r] * g;
    }
  }
  for (int r = 0; r < kRowTile; ++r)
    for (int f = 0; f < kColumnTile; ++f) products[r][f] = total(s[r][f]);
}

using ProductTile = void (*)(const float* const*, const float*, int64_t, float* const*);
constexpr int kRowTile = kWidth == 16 ? 4 : 2, kColumnTile = kWidth == 16 ? 6 : 4;
template <int kTile, int... kCounts>
ProductTile product_tile_of(int64_t count, std::integer_sequence<int, kCounts...>) {
  static const ProductTile table[] = {product_tile<kTile, kCounts + 1>...};
  return table[count - 1];
}

// y[l, n, i, j] = the values of x[l, n] under the window at (i, j) times kernel[l, i, j]: x (lane, image, height, width,
// channel), kernel (lane, row, column, height, width, channel, feature); `turned` is room for one lane's x.
ffi::Error LocalCorrelate(ffi::ThreadPool pool, Floats x, Floats kernel, ffi::ResultBuffer<ffi::F32> y,
                          ffi::ResultBuffer<ffi::F32> turned, Integers strides, Integers low, Integers dilation) {
  const LocalGeometry g(x.dimensions(), kernel.dimensions(), strides, low, dilation);
  for (int64_t lane = 0; lane < x.dimensions()[0]; ++lane) {
    float* rows = turned->typed_data();
    const float* weights = kernel.typed_data() + lane * g.kernel_size();
    float* to = y->typed_data() + lane * g.images * g.out_size();
    ffi::Error error = turn_all(pool, x.typed_data() + lane * g.images * g.in_size(), g.images, g.in_size(), rows,
                                g.row_size);
    if (error.failure()) return error;
    const int64_t strip = 4, strips = (g.out_width + strip - 1) / strip;
    error = parallel(pool, g.out_height * strips, [&](int64_t chunk) {
      const int64_t i = chunk / strips, start = chunk % strips * strip, end = std::min(g.out_width, start + strip);
      std::vector<float> sums((end - start) * g.features * g.row_size);
      std::vector<Term> terms;
      for (int64_t j = start; j < end; ++j) {
        terms.clear();
        const float* bank = weights + (i * g.out_width + j) * g.taps() * g.channels * g.features;
        g.each_tap(i, j, [&](int64_t tap, int64_t place) {
          for (int64_t c = 0; c < g.channels; ++c)
            terms.push_back({rows + (place * g.channels + c) * g.row_size, bank + (tap * g.channels + c) * g.features});
        });
        weighted_rows(terms, g.features, 1, &sums[(j - start) * g.features * g.row_size], g.row_size);
      }
      turn_back(sums.data(), g.row_size, g.images, g.out_size(), (i * g.out_width + start) * g.features,
                (end - start) * g.features, to);
    });
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

// The transpose in x: what each value of the input gets from the gradients of the positions that see it.
ffi::Error LocalInputGradient(ffi::ThreadPool pool, Floats gradient, Floats kernel, ffi::ResultBuffer<ffi::F32> x,
                              ffi::ResultBuffer<ffi::F32> turned, Integers strides, Integers low, Integers dilation) {
  const LocalGeometry g(x->dimensions(), kernel.dimensions(), strides, low, dilation);
  for (int64_t lane = 0; lane < gradient.dimensions()[0]; ++lane) {
    float* rows = turned->typed_data();
    const float* weights = kernel.typed_data() + lane * g.kernel_size();
    float* to = x->typed_data() + lane * g.images * g.in_size();
    ffi::Error error = turn_all(pool, gradient.typed_data() + lane * g.images * g.out_size(), g.images, g.out_size(),
                                rows, g.row_size);
    if (error.failure()) return error;
    const int64_t strip = 4, strips = (g.width + strip - 1) / strip;
    error = parallel(pool, g.height * strips, [&](int64_t chunk) {
      const int64_t h = chunk / strips, start = chunk % strips * strip, end = std::min(g.width, start + strip);
      std::vector<float> sums((end - start) * g.channels * g.row_size);
      std::vector<Term> terms;
      for (int64_t w = start; w < end; ++w) {
        terms.clear();
        g.each_position(h, w, [&](int64_t position, int64_t tap) {
          const float* bank = weights + (position * g.taps() + tap) * g.channels * g.features;
          for (int64_t f = 0; f < g.features; ++f)
            terms.push_back({rows + (position * g.features + f) * g.row_size, bank + f});
        });
        weighted_rows(terms, g.channels, g.features, &sums[(w - start) * g.channels * g.row_size], g.row_size);
      }
      turn_back(sums.data(), g.row_size, g.images, g.in_size(), (h * g.width + start) * g.channels,
                (end - start) * g.channels, to);
    });
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

// The transpose in the kernel: at each position the values under its window times its gradient, summed over images. One
// thread makes the whole of each sum, so the result depends on neither threads nor timing.
ffi::Error LocalKernelGradient(ffi::ThreadPool pool, Floats x, Floats gradient, ffi::ResultBuffer<ffi::F32> kernel,
                               ffi::ResultBuffer<ffi::F32> turned, Integers strides, Integers low, Integers dilation) {
  const LocalGeometry g(x.dimensions(), kernel->dimensions(), strides, low, dilation);
  for (int64_t lane = 0; lane < x.dimensions()[0]; ++lane) {
    float* values = turned->typed_data();
    const float* from = gradient.typed_data() + lane * g.images * g.out_size();
    float* weights = kernel->typed_data() + lane * g.kernel_size();
    ffi::Error error = turn_all(pool, x.typed_data() + lane * g.images * g.in_size(), g.images, g.in_size(), values,
                                g.row_size);
    if (error.failure()) return error;
    const int64_t strip = 4, strips = (g.out_width + strip - 1) / strip, bank_size = g.taps() * g.channels * g.features;
    error = parallel(pool, g.out_height * strips, [&](int64_t chunk) {
      const int64_t i = chunk / strips, start = chunk % strips * strip, end = std::min(g.out_width, start + strip);
      const int64_t features = (end - start) * g.features;
      std::vector<float> columns(features * g.row_size);
      turn(from, g.images, g.out_size(), (i * g.out_width + start) * g.features, features, columns.data(), g.row_size);
      std::vector<const float*> rows;
      std::vector<float*> products;
      for (int64_t j = start; j < end; ++j) {
        float* bank = weights + (i * g.out_width + j) * bank_size;
        std::fill(bank, bank + bank_size, 0.0f);  // taps on the padding stay so
        rows.clear(), products.clear();
        g.each_tap(i, j, [&](int64_t tap, int64_t place) {
          for (int64_t c = 0; c < g.channels; ++c) {
            rows.push_back(values + (place * g.channels + c) * g.row_size);
            products.push_back(bank + (tap * g.channels + c) * g.features);
          }
        });
        const float* column = &columns[(j - start) * g.features * g.row_size];
        const auto counts = std::make_integer_sequence<int, kColumnTile>{};
        const int64_t tiles = (g.features + kColumnTile - 1) / kColumnTile, count = rows.size();
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t first = g.features * tile / tiles, size = g.features * (tile + 1) / tiles - first;
          const ProductTile many = product_tile_of<kRowTile>(size, counts), one = product_tile_of<1>(size, counts);
          for (int64_t r = 0; r < count;) {
            const bool whole = count - r >= kRowTile;
            float* at[kRowTile];
            for (int k = 0; k < (whole ? kRowTile : 1); ++k) at[k] = products[r + k] + first;
            (whole ? many : one)(&rows[r], column + first * g.row_size, g.row_size, at);
            r += whole ? kRowTile : 1;
          }
        }
      }
    });
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

}  // namespace

using ffi::Ffi;
#define CORRELATION_ATTRIBUTES \
  .Attr<Integers>("strides").Attr<Integers>("low").Attr<Integers>("x_dilation").Attr<Integers>("kernel_dilation")
#define BETWEEN_ATTRIBUTES \
  .Attr<Integers>("size").Attr<Integers>("window").Attr<Integers>("pool_strides").Attr<Integers>("pool_low")
#define POOLING_ATTRIBUTES .Attr<Integers>("window").Attr<Integers>("strides").Attr<Integers>("low")
#define TWO_FLOATS Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>()
#define AND_WINNERS .Arg<ffi::Buffer<ffi::S32>>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(cnnlib_correlate, Correlate, TWO_FLOATS.Ret<Floats>() CORRELATION_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_correlate_pooled, CorrelatePooled,
    TWO_FLOATS.Ret<Floats>().Ret<ffi::Buffer<ffi::S32>>() CORRELATION_ATTRIBUTES BETWEEN_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_correlate_unpooled, CorrelateUnpooled,
    TWO_FLOATS AND_WINNERS.Ret<Floats>() CORRELATION_ATTRIBUTES BETWEEN_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(cnnlib_kernel_gradient, KernelGradient, TWO_FLOATS.Ret<Floats>() CORRELATION_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_kernel_gradient_unpooled, KernelGradientUnpooled,
    TWO_FLOATS AND_WINNERS.Ret<Floats>() CORRELATION_ATTRIBUTES BETWEEN_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(cnnlib_scatter, Scatter, TWO_FLOATS.Ret<Floats>() CORRELATION_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_scatter_unpooled, ScatterUnpooled,
    TWO_FLOATS AND_WINNERS.Ret<Floats>() CORRELATION_ATTRIBUTES BETWEEN_ATTRIBUTES);
#define LOCAL_ATTRIBUTES .Attr<Integers>("strides").Attr<Integers>("low").Attr<Integers>("dilation")
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_local_correlate, LocalCorrelate,
    Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>() LOCAL_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_local_input_gradient, LocalInputGradient,
    Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>() LOCAL_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_local_kernel_gradient, LocalKernelGradient,
    Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Ret<Floats>() LOCAL_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_max_pool, MaxPool,
    Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Ret<Floats>() POOLING_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_max_pool_gradient, MaxPoolGradient,
    Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Floats>() POOLING_ATTRIBUTES);
