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

// As many values as a vector register holds, and as many such vectors as leave room for the operands beside them.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 14;
#else
constexpr int kWidth = 8, kRows = 6;
#endif
typedef float Vector __attribute__((vector_size(4 * kWidth), may_alias));
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

// A place under the kernel: its offset from a position of the image, and the row of the kernel that it is multiplied by.
struct Tap {
  int64_t offset, row;
};

// Positions of the output that meet the same taps, image after image of a block.
struct Phase {
  std::vector<int64_t> from;  // offsets into the block's padded images
  std::vector<int64_t> to;    // positions of the block's output
  std::vector<Tap> taps;
  int64_t positions;  // of one image
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
           Integers kernel_dilations)
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
    fold_columns();
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
  // once a column, shifted, among zeros. Chosen is the fold that wastes the fewest lanes and taps.
  void fold_columns() {
    if (kernel_dilation[1] != 1) return;
    auto useful = [&](int64_t columns) {
      double lanes = double(columns * features) / round_up(columns * features, kWidth);
      return lanes * kernel_width / (kernel_width + (columns - 1) * stride[1]);
    };
    int64_t best = 1;
    for (int64_t columns = 2; columns * features <= kWidth; ++columns)
      if (out_width % columns == 0 && useful(columns) > useful(best)) best = columns;
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

  // How many images, `most` at most, are taken together, so that their positions fill tiles of kRows with little waste.
  int64_t images_a_block(int64_t most) const {
    const int64_t alike = std::max<int64_t>(1, positions() / (x_dilation[0] * x_dilation[1]));
    auto used = [&](int64_t images) { return double(images * alike) / round_up(images * alike, kRows); };
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
            if (top % x_dilation[0] == 0 && left % x_dilation[1] == 0)
              phase.taps.push_back({at(top, left), (r * kernel_width + s) * channels});
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
};

// kRows positions by kVectors vectors of output channels, held in registers over all taps and input channels.
template <int kVectors>
void forward_tile(const float* images, const int64_t* position, const std::vector<Tap>& taps, int64_t channels,
                  const float* kernel, int64_t kernel_row, const std::array<int64_t, kVectors>& vector,
                  Vector (&sum)[kRows][kVectors]) {
  Vector s[kRows][kVectors] = {};
  const float* from[kRows];
  for (int r = 0; r < kRows; ++r) from[r] = images + position[r];
  for (auto [offset, row] : taps) {
    const float* weights = kernel + row * kernel_row;
    for (int64_t c = 0; c < channels; ++c, weights += kernel_row) {
      Vector k[kVectors];
      for (int v = 0; v < kVectors; ++v) k[v] = load(weights + vector[v]);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float x = from[r][offset + c];
        for (int v = 0; v < kVectors; ++v) s[r][v] += x * k[v];
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = s[r][v];
}

template <int kVectors>
void forward_block(const Geometry& g, const float* images, const Phase& phase, int64_t count, const float* kernel,
                   int64_t feature, float* y) {
  const auto vector = g.vectors<kVectors>(feature);
  for (int64_t start = 0; start < count; start += kRows) {
    int64_t position[kRows];
    for (int r = 0; r < kRows; ++r) position[r] = phase.from[std::min<int64_t>(start + r, count - 1)];
    Vector sum[kRows][kVectors];
    forward_tile<kVectors>(images, position, phase.taps, g.channels, kernel, g.row_size(), vector, sum);
    int rows = std::min<int64_t>(kRows, count - start);
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

// y[l, n] = the correlation of x[l, n] with kernel[l]: x (lane, image, height, width, channel), kernel (lane, height,
// width, channel, feature).
ffi::Error Correlate(ffi::ThreadPool pool, Floats x, Floats kernel, ffi::ResultBuffer<ffi::F32> y, Integers strides,
                     Integers low, Integers x_dilation, Integers kernel_dilation) {
  const Geometry g(x.dimensions(), kernel.dimensions(), y->dimensions(), strides, low, x_dilation, kernel_dilation);
  const int64_t lanes = x.dimensions()[0], batch = x.dimensions()[1];
  const int64_t kernel_size = g.rows() * g.row_size(), plain_size = kernel.element_count() / lanes;
  const float* packed = kernel.typed_data();
  std::vector<float> storage;
  if (g.packs()) {
    storage.resize(lanes * kernel_size);
    for (int64_t lane = 0; lane < lanes; ++lane)
      g.each_run([&](int64_t to, int64_t from) {
        std::memcpy(&storage[lane * kernel_size + to], packed + lane * plain_size + from, 4 * g.features / g.fold);
      });
    packed = storage.data();
  }
  const int64_t block = g.images_a_block(batch);
  const auto phases = g.phases(block);
  const int64_t chunk_size = round_up(std::max<int64_t>(1, batch / 32), block);
  const int64_t chunks = (batch + chunk_size - 1) / chunk_size;
  return parallel(pool, lanes * chunks, [&](int64_t chunk) {
    std::vector<float> scratch;
    const int64_t lane = chunk / chunks, end = std::min(batch, (chunk % chunks + 1) * chunk_size);
    const float* k = packed + lane * kernel_size;
    for (int64_t n = chunk % chunks * chunk_size; n < end; n += block) {
      const int64_t count = std::min(block, end - n);
      const float* images = g.padded(x.typed_data() + (lane * batch + n) * g.image_size(), count, scratch);
      float* to = y->typed_data() + (lane * batch + n) * g.positions() * g.features;
      for (const Phase& phase : phases) {
        int64_t feature = 0;
        for (; feature + kWidth < g.row_size(); feature += 2 * kWidth)
          forward_block<2>(g, images, phase, count * phase.positions, k, feature, to);
        if (feature < g.row_size()) forward_block<1>(g, images, phase, count * phase.positions, k, feature, to);
      }
    }
  });
}

// result[l] = the sum over images of x[l, n], shifted by each tap, times gradient[l, n]; shapes as in Correlate.
ffi::Error KernelGradient(ffi::ThreadPool pool, Floats x, Floats gradient, ffi::ResultBuffer<ffi::F32> result,
                          Integers strides, Integers low, Integers x_dilation, Integers kernel_dilation) {
  const Geometry g(x.dimensions(), result->dimensions(), gradient.dimensions(), strides, low, x_dilation,
                   kernel_dilation);
  const int64_t lanes = x.dimensions()[0], batch = x.dimensions()[1];
  const int64_t row_size = g.row_size(), sums_size = g.spread_size(), kernel_size = g.rows() * sums_size;
  // As many partial sums whatever the machine, added in order: the result depends on neither threads nor timing.
  const int64_t parts = std::clamp<int64_t>(batch * g.positions() / kPartPositions, 1, kPartialSums);
  const int64_t chunk_size = (batch + parts - 1) / parts, chunks = (batch + chunk_size - 1) / chunk_size;
  const int64_t block = std::min(chunk_size, std::max<int64_t>(1, 16 * kRows / g.positions()));
  const auto phases = g.phases(block);
  // Taps that follow one another in memory, in the image and in the kernel, make one segment of so many values.
  struct Segment {
    const Phase* phase;
    Tap tap;
    int64_t length;
  };
  std::vector<Segment> segments;
  for (const Phase& phase : phases)
    for (size_t t = 0; t < phase.taps.size(); ++t) {
      const Tap tap = phase.taps[t];
      Segment* last = t > 0 ? &segments.back() : nullptr;
      if (last && tap.offset == last->tap.offset + last->length && tap.row == last->tap.row + last->length)
        last->length += g.channels;
      else
        segments.push_back({&phase, tap, g.channels});
    }
  std::vector<float> partial(lanes * chunks * kernel_size);
  ffi::Error error = parallel(pool, lanes * chunks, [&](int64_t chunk) {
    std::vector<float> scratch, wide;
    if (g.features < kWidth) wide.resize(block * g.positions() * row_size);
    const int64_t lane = chunk / chunks, end = std::min(batch, (chunk % chunks + 1) * chunk_size);
    for (int64_t n = chunk % chunks * chunk_size; n < end; n += block) {
      const int64_t count = std::min(block, end - n);
      const float* images = g.padded(x.typed_data() + (lane * batch + n) * g.image_size(), count, scratch);
      const float* from = gradient.typed_data() + (lane * batch + n) * g.positions() * g.features;
      if (g.features < kWidth) {
        for (int64_t p = 0; p < count * g.positions(); ++p)
          std::memcpy(&wide[p * row_size], from + p * g.features, 4 * g.features);
        from = wide.data();
      }
      for (int64_t feature = 0; feature < row_size; feature += 2 * kWidth)
        for (const auto& [phase, tap, length] : segments)
          for (int64_t start = 0; start < length; start += kRows) {
            const int64_t tile = std::min<int64_t>(kRows, length - start);
            const auto sizes = std::make_integer_sequence<int, kRows>();
            const bool two = feature + kWidth < row_size;
            (two ? gradient_tile_of<2>(tile, sizes) : gradient_tile_of<1>(tile, sizes))(
                g, images + tap.offset + start, *phase, count * phase->positions, from, feature,
                &partial[chunk * kernel_size + (tap.row + start) * sums_size]);
          }
    }
  });
  if (error.failure()) return error;
  const int64_t plain_size = result->element_count() / lanes;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    float *sum = &partial[lane * chunks * kernel_size], *plain = result->typed_data() + lane * plain_size;
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

// Max pooling of (image, height, width, channel).
struct Pooling {
  int64_t height, width, channels, out_height, out_width;
  Integers window, strides, low;

  // The rows (axis 0) or columns (axis 1) of the image under the window at a position.
  std::pair<int64_t, int64_t> under(int axis, int64_t position) const {
    const int64_t start = position * strides[axis] - low[axis], size = axis == 0 ? height : width;
    return {std::max<int64_t>(start, 0), std::min(start + window[axis], size)};
  }
  int64_t in_size() const { return height * width * channels; }
  int64_t out_size() const { return out_height * out_width * channels; }

  // Calls see(output, taps, tap_count, lanes) with offsets into one image, for every position and up to kWidth channels.
  template <typename See>
  void each_vector(See see) const {
    std::vector<int64_t> taps(window[0] * window[1]);
    for (int64_t i = 0; i < out_height; ++i) {
      const auto [top, bottom] = under(0, i);
      for (int64_t j = 0; j < out_width; ++j) {
        const auto [left, right] = under(1, j);
        for (int64_t c = 0; c < channels; c += kWidth) {
          int64_t count = 0;
          for (int64_t h = top; h < bottom; ++h)
            for (int64_t w = left; w < right; ++w) taps[count++] = (h * width + w) * channels + c;
          see((i * out_width + j) * channels + c, taps.data(), count, std::min<int64_t>(kWidth, channels - c));
        }
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

ffi::Error MaxPool(ffi::ThreadPool pool, Floats x, ffi::ResultBuffer<ffi::F32> y, Integers window, Integers strides,
                   Integers low) {
  const auto in = x.dimensions(), out = y->dimensions();
  const Pooling p{in[1], in[2], in[3], out[1], out[2], window, strides, low};
  return parallel_over_images(pool, in[0], [&](int64_t n) {
    const float *from = x.typed_data() + n * p.in_size(), *from_end = from + p.in_size();
    float *to = y->typed_data() + n * p.out_size(), *to_end = to + p.out_size();
    p.each_vector([&](int64_t output, const int64_t* taps, int64_t count, int64_t lanes) {
      Vector best = load(from + taps[0], from_end, lanes);
      for (int64_t t = 1; t < count; ++t) {
        const Vector v = load(from + taps[t], from_end, lanes);
        best = ((v > best) | (v != v)) ? v : best;  // what is not a number wins
      }
      store(to + output, to_end, lanes, best);
    });
  });
}

// The gradient of each window goes to the values that equal its largest, in equal shares.
ffi::Error MaxPoolGradient(ffi::ThreadPool pool, Floats x, Floats y, Floats gradient, ffi::ResultBuffer<ffi::F32> result,
                           Integers window, Integers strides, Integers low) {
  const auto in = x.dimensions(), out = y.dimensions();
  const Pooling p{in[1], in[2], in[3], out[1], out[2], window, strides, low};
  const Vector zero = {};
  // Windows that tile the image, in whole vectors, meet each value once: it is written, not added to.
  const bool tiles = p.channels % kWidth == 0 && p.height == p.out_height * window[0] && strides[0] == window[0] &&
                     p.width == p.out_width * window[1] && strides[1] == window[1] && low[0] == 0 && low[1] == 0;
  return parallel_over_images(pool, in[0], [&](int64_t n) {
    const float *from = x.typed_data() + n * p.in_size(), *from_end = from + p.in_size();
    const float *largest = y.typed_data() + n * p.out_size(), *largest_end = largest + p.out_size();
    const float *share = gradient.typed_data() + n * p.out_size(), *share_end = share + p.out_size();
    float *to = result->typed_data() + n * p.in_size(), *to_end = to + p.in_size();
    if (!tiles) std::fill(to, to_end, 0.0f);
    p.each_vector([&](int64_t output, const int64_t* taps, int64_t count, int64_t lanes) {
      const Vector best = load(largest + output, largest_end, lanes);
      Vector winners = {};
      for (int64_t t = 0; t < count; ++t) winners += load(from + taps[t], from_end, lanes) == best ? zero + 1 : zero;
      Vector each = load(share + output, share_end, lanes) / winners;
      for (int64_t lane = lanes; lane < kWidth; ++lane) each[lane] = 0;  // these belong to the next position
      for (int64_t t = 0; t < count; ++t) {
        const Vector won = load(from + taps[t], from_end, lanes) == best ? each : zero;
        if (tiles)
          store(to + taps[t], won);
        else
          store(to + taps[t], to_end, lanes, load(to + taps[t], to_end, lanes) + won);
      }
    });
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
#define POOLING_ATTRIBUTES .Attr<Integers>("window").Attr<Integers>("strides").Attr<Integers>("low")
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_correlate, Correlate,
    Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<Floats>() CORRELATION_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    cnnlib_kernel_gradient, KernelGradient,
    Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<Floats>() CORRELATION_ATTRIBUTES);
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
