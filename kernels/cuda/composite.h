// Compositing: one warp per tile of 8x8 pixels, forward and backward.
//
// A kernel body is written against a `Warp`, so that the same source runs on a GPU (gpu.h) and, for
// tests, on a CPU (emulation.h). `warp.Each(f)` is one phase: every lane runs f(lane), and the next
// phase starts when all are done. What a lane keeps between phases is a `PerLane`; what lanes tell
// each other goes through `Shared`. No shuffles and no atomics: sums have one order, so gradients
// have the same bits on every run.
#pragma once

#include "bin.h"

namespace splat {

constexpr int kLanes = 32;
constexpr int kForwardBatch = 32;   // Gaussians in shared memory at once, forward
constexpr int kBackwardBatch = 16;  // and backward
constexpr int kTilePixels = kTile * kTile;

struct Composite {
  // in
  const float4* geometry;    // [images * gaussians, 2]
  const float4* features;    // [images * gaussians, K / 4]
  const int* slots;          // [images * capacity]
  const int* slot_gaussian;  // [images * capacity]
  const int2* ranges;        // [images, rows, columns]
  int width, height, rows, columns;
};

// Where a tile and its lanes' pixels lie. A lane holds two neighbours in x.
struct TilePlace {
  int image, left, top;
  SPLAT_HD TilePlace(int64_t tile, int rows, int columns)
      : image(static_cast<int>(tile / (static_cast<int64_t>(rows) * columns))),
        left(static_cast<int>(tile % columns) * kTile),
        top(static_cast<int>(tile / columns % rows) * kTile) {}
  SPLAT_HD float CentreX() const { return left + 0.5f * kTile; }
  SPLAT_HD float CentreY() const { return top + 0.5f * kTile; }
};

// A pixel of the tile, counted row by row, relative to the tile's centre.
SPLAT_HD float PixelX(int pixel) { return pixel % kTile - (0.5f * kTile - 0.5f); }
SPLAT_HD float PixelY(int pixel) { return pixel / kTile - (0.5f * kTile - 0.5f); }

// Strength at the i-th pixel of a lane; said so that both share what depends on y alone.
SPLAT_HD float LaneStrength(const Splat& splat, int lane, int i) {
  return Strength(splat, PixelX(2 * lane) + i, PixelY(2 * lane));
}

SPLAT_HD bool InImage(const TilePlace& place, int pixel, int width, int height) {
  return place.left + pixel % kTile < width && place.top + pixel / kTile < height;
}

SPLAT_HD int64_t ImagePixel(const TilePlace& place, int pixel, int width, int height) {
  const int64_t y = place.top + pixel / kTile;
  return (place.image * static_cast<int64_t>(height) + y) * width + place.left + pixel % kTile;
}

template <int K>
SPLAT_HD void Unpack(const float4* from, float (&to)[K]) {
  SPLAT_UNROLL
  for (int k = 0; k < K / 4; ++k) {
    const float4 v = from[k];
    to[4 * k] = v.x, to[4 * k + 1] = v.y, to[4 * k + 2] = v.z, to[4 * k + 3] = v.w;
  }
}

template <int K>
struct ForwardTile {
  Composite in;
  float4* out;           // [images, height, width, K / 4] sum of weight * features
  float* alpha;          // [images, height, width] sum of weights; near 0 more precise than 1 - T
  float* transmittance;  // [images, height, width] T, the product of what every Gaussian lets through
  int* last;             // [images, height, width] one past the pixel's last, from the range's begin

  struct Shared {
    Splat splat[kForwardBatch];
    alignas(16) float4 features[kForwardBatch][K / 4];
  };

  struct Pixel {
    float sum[K];
    float alpha;
    float transmittance;
    int last;
    bool open;
  };

  template <class Warp>
  SPLAT_HD void operator()(Warp& warp, int64_t tile, Shared& shared) const {
    const TilePlace place(tile, in.rows, in.columns);
    const int2 range = in.ranges[tile];
    typename Warp::template PerLane<Pixel[2]> pixels;
    typename Warp::template PerLane<int> upcoming;  // fetched a batch ahead, to hide its latency

    warp.Each([&](int lane) {
      upcoming[lane] = Owner(range.x + lane, range.y);
      SPLAT_UNROLL
      for (int i = 0; i < 2; ++i) {
        Pixel& pixel = pixels[lane][i];
        SPLAT_UNROLL
        for (int k = 0; k < K; ++k) pixel.sum[k] = 0.0f;
        pixel.alpha = 0.0f;
        pixel.transmittance = 1.0f;
        pixel.last = 0;
        pixel.open = InImage(place, 2 * lane + i, in.width, in.height);
      }
    });

    for (int base = range.x; base < range.y; base += kForwardBatch) {
      const int count = range.y - base < kForwardBatch ? range.y - base : kForwardBatch;
      warp.Each([&](int lane) {
        const int gaussian = upcoming[lane];
        upcoming[lane] = Owner(base + kForwardBatch + lane, range.y);
        if (lane >= count) return;
        shared.splat[lane] = Prepare(Load(in.geometry, gaussian), place.CentreX(), place.CentreY());
        SPLAT_UNROLL
        for (int k = 0; k < K / 4; ++k) {
          shared.features[lane][k] = in.features[static_cast<int64_t>(gaussian) * (K / 4) + k];
        }
      });
      warp.Each([&](int lane) {
        for (int j = 0; j < count; ++j) {
          const Splat splat = shared.splat[j];
          SPLAT_UNROLL
          for (int i = 0; i < 2; ++i) {
            Pixel& pixel = pixels[lane][i];
            const float strength = LaneStrength(splat, lane, i);
            if (strength < kMinAlpha || !pixel.open) continue;
            const float alpha = fminf(strength, kMaxAlpha);
            const float rest = pixel.transmittance * (1.0f - alpha);
            if (rest <= kMinTransmittance) {
              pixel.open = false;
              continue;
            }
            const float weight = alpha * pixel.transmittance;
            float features[K];
            Unpack(shared.features[j], features);
            SPLAT_UNROLL
            for (int k = 0; k < K; ++k) {
              pixel.sum[k] = fmaf(weight, features[k], pixel.sum[k]);
            }
            pixel.alpha += weight;
            pixel.transmittance = rest;
            pixel.last = base - range.x + j + 1;
          }
        }
      });
      if (!warp.Any([&](int lane) { return pixels[lane][0].open || pixels[lane][1].open; })) break;
    }

    warp.Each([&](int lane) {
      SPLAT_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (!InImage(place, 2 * lane + i, in.width, in.height)) continue;
        const Pixel& pixel = pixels[lane][i];
        const int64_t at = ImagePixel(place, 2 * lane + i, in.width, in.height);
        SPLAT_UNROLL
        for (int k = 0; k < K / 4; ++k) {
          out[at * (K / 4) + k] = {pixel.sum[4 * k], pixel.sum[4 * k + 1], pixel.sum[4 * k + 2],
                                   pixel.sum[4 * k + 3]};
        }
        alpha[at] = pixel.alpha;
        transmittance[at] = pixel.transmittance;
        last[at] = pixel.last;
      }
    });
  }

  // The Gaussian at a place of the tile's range, 0 past its end.
  SPLAT_HD int Owner(int place, int end) const {
    return place < end ? in.slot_gaussian[in.slots[place]] : 0;
  }
};

// A pixel on its way back, from the last Gaussian composited to the first: the transmittance is
// rebuilt by division, and the light behind a Gaussian is a running sum.
struct WayBack {
  float alpha_gradient;
  float transmittance;
  float behind;  // gradient-weighted light from behind the current Gaussian
  int last;

  // Past a Gaussian: its weight w = alpha T and strength gradient u = alpha dL/dalpha, where `light`
  // is dL/dw.
  SPLAT_HD void Pass(float strength, float light, float& u, float& w) {
    const float alpha = fminf(strength, kMaxAlpha);
    const float inverse = Reciprocal(1.0f - alpha);
    transmittance *= inverse;
    const float d_alpha = transmittance * light - behind * inverse;
    w = alpha * transmittance;
    behind = fmaf(w, light, behind);
    // Where alpha is clipped it no longer depends on the Gaussian's strength.
    if (strength <= kMaxAlpha) u = alpha * d_alpha;
  }
};

constexpr int kStride = kLanes + 2;  // spreads rows of pairs over the banks, 16-byte aligned

// The gradient of one slot: x, y, p, q, r, opacity, then K features.
constexpr int kGeometryGradients = 6;

// Walks each tile's Gaussians from the last composited to the first. Every batch has two halves.
// With lanes as pixels: each pair's weight w and strength gradient u are written to shared memory.
// With lanes as Gaussians (two lanes to each, half the tile's pixels apiece): the pairs are summed
// over pixels, u against the monomials of the pixel's place, of which every geometric gradient is a
// combination, and w against the pixel's colour gradient.
template <int K>
struct BackwardTile {
  Composite in;
  const float* transmittance;    // [images, height, width] as the forward pass left it
  const int* last;               // [images, height, width]
  const float4* out_gradient;    // [images, height, width, K / 4]
  const float* alpha_gradient;   // [images, height, width]
  float* slot_gradients;         // [images * capacity, kGeometryGradients + K]

  static constexpr int kValues = kGeometryGradients + K;

  struct Shared {
    alignas(16) float4 features[kBackwardBatch][K / 4];
    alignas(16) float4 out_gradient[kTilePixels][K / 4];
    alignas(16) float2 u[kBackwardBatch][kStride];  // a lane's two pixels together
    alignas(16) float2 w[kBackwardBatch][kStride];
    float sums[2][kBackwardBatch][kValues];
    Splat splat[kBackwardBatch];
    int slot[kBackwardBatch];
  };

  struct Pixel : WayBack {
    float gradient[K];
  };

  template <class Warp>
  SPLAT_HD void operator()(Warp& warp, int64_t tile, Shared& shared) const {
    const TilePlace place(tile, in.rows, in.columns);
    const int2 range = in.ranges[tile];
    if (range.x == range.y) return;
    typename Warp::template PerLane<Pixel[2]> pixels;

    warp.Each([&](int lane) {
      SPLAT_UNROLL
      for (int i = 0; i < 2; ++i) {
        Pixel& pixel = pixels[lane][i];
        const bool inside = InImage(place, 2 * lane + i, in.width, in.height);
        const int64_t at = ImagePixel(place, 2 * lane + i, in.width, in.height);
        SPLAT_UNROLL
        for (int k = 0; k < K / 4; ++k) {
          shared.out_gradient[2 * lane + i][k] =
              inside ? out_gradient[at * (K / 4) + k] : float4{0.0f, 0.0f, 0.0f, 0.0f};
        }
        Unpack(shared.out_gradient[2 * lane + i], pixel.gradient);
        pixel.transmittance = inside ? transmittance[at] : 1.0f;
        pixel.alpha_gradient = inside ? alpha_gradient[at] : 0.0f;
        pixel.behind = 0.0f;
        pixel.last = inside ? last[at] : 0;
      }
    });
    const int reached = warp.Max([&](int lane) {
      const Pixel(&pixel)[2] = pixels[lane];
      return pixel[0].last > pixel[1].last ? pixel[0].last : pixel[1].last;
    });

    // Slots that no pixel reached have no gradient.
    warp.Each([&](int lane) {
      for (int i = range.x + reached; i < range.y; ++i) {
        float* row = slot_gradients + static_cast<int64_t>(in.slots[i]) * kValues;
        for (int v = lane; v < kValues; v += kLanes) row[v] = 0.0f;
      }
    });

    for (int end = reached; end > 0; end -= kBackwardBatch) {
      const int begin = end > kBackwardBatch ? end - kBackwardBatch : 0;
      const int count = end - begin;
      warp.Each([&](int lane) {
        if (lane >= count) return;
        const int slot = in.slots[range.x + begin + lane];
        const int gaussian = in.slot_gaussian[slot];
        shared.slot[lane] = slot;
        shared.splat[lane] = Prepare(Load(in.geometry, gaussian), place.CentreX(), place.CentreY());
        SPLAT_UNROLL
        for (int k = 0; k < K / 4; ++k) {
          shared.features[lane][k] = in.features[static_cast<int64_t>(gaussian) * (K / 4) + k];
        }
      });
      warp.Each([&](int lane) {
        for (int j = count - 1; j >= 0; --j) {
          const Splat splat = shared.splat[j];
          float u[2] = {0.0f, 0.0f}, w[2] = {0.0f, 0.0f};
          SPLAT_UNROLL
          for (int i = 0; i < 2; ++i) {
            Pixel& pixel = pixels[lane][i];
            const float strength = LaneStrength(splat, lane, i);
            if (strength < kMinAlpha || begin + j >= pixel.last) continue;
            pixel.Pass(strength, Light(shared.features[j], pixel), u[i], w[i]);
          }
          shared.u[j][lane] = {u[0], u[1]};
          shared.w[j][lane] = {w[0], w[1]};
        }
      });
      warp.Each([&](int lane) {
        const int j = lane % kBackwardBatch, half = lane / kBackwardBatch;
        if (j < count) SumPixels(shared, j, half, shared.sums[half][j]);
      });
      warp.Each([&](int lane) {
        if (lane < count) Combine(shared.splat[lane], shared.sums[0][lane], shared.sums[1][lane]);
      });
      warp.Each([&](int lane) {
        for (int i = lane; i < count * kValues; i += kLanes) {
          const int j = i / kValues, v = i % kValues;
          slot_gradients[static_cast<int64_t>(shared.slot[j]) * kValues + v] = shared.sums[0][j][v];
        }
      });
    }
  }

  SPLAT_HD float Light(const float4 (&packed_features)[K / 4], const Pixel& pixel) const {
    float features[K];
    Unpack(packed_features, features);
    float light = pixel.alpha_gradient;
    SPLAT_UNROLL
    for (int k = 0; k < K; ++k) light = fmaf(features[k], pixel.gradient[k], light);
    return light;
  }

  // Sums over half of the tile's rows: u * {1, x, y, x^2, xy, y^2} and w * colour gradient.
  SPLAT_HD void SumPixels(const Shared& shared, int j, int half, float (&sums)[kValues]) const {
    float moments[6] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    float colours[K];
    SPLAT_UNROLL
    for (int k = 0; k < K; ++k) colours[k] = 0.0f;
    for (int row = half * kTile / 2; row < (half + 1) * kTile / 2; ++row) {
      float u[kTile], w[kTile];
      Unpack(reinterpret_cast<const float4*>(&shared.u[j][row * kTile / 2]), u);
      Unpack(reinterpret_cast<const float4*>(&shared.w[j][row * kTile / 2]), w);
      float u0 = 0.0f, u1 = 0.0f, u2 = 0.0f;
      SPLAT_UNROLL
      for (int column = 0; column < kTile; ++column) {
        const float x = PixelX(column);
        u0 += u[column];
        u1 = fmaf(u[column], x, u1);
        u2 = fmaf(u[column], x * x, u2);
        float gradient[K];
        Unpack(shared.out_gradient[row * kTile + column], gradient);
        SPLAT_UNROLL
        for (int k = 0; k < K; ++k) colours[k] = fmaf(w[column], gradient[k], colours[k]);
      }
      const float y = PixelY(row * kTile);
      moments[0] += u0;
      moments[1] += u1;
      moments[2] = fmaf(u0, y, moments[2]);
      moments[3] += u2;
      moments[4] = fmaf(u1, y, moments[4]);
      moments[5] = fmaf(u0, y * y, moments[5]);
    }
    SPLAT_UNROLL
    for (int v = 0; v < 6; ++v) sums[v] = moments[v];
    SPLAT_UNROLL
    for (int k = 0; k < K; ++k) sums[kGeometryGradients + k] = colours[k];
  }

  // Adds the two halves and turns moments into gradients, in place. With the whitened offsets
  // u = p dx + q dy, v = r dy of d = centre - pixel, the strength's logarithm is -(u^2 + v^2) / 2;
  // they are taken about the tile's centre, where nothing cancels however far the splat's is.
  SPLAT_HD void Combine(const Splat& s, float (&sums)[kValues], const float (&other)[kValues]) const {
    SPLAT_UNROLL
    for (int v = 0; v < kValues; ++v) sums[v] += other[v];
    const float one = sums[0], x = sums[1], y = sums[2], xx = sums[3], xy = sums[4], yy = sums[5];
    const float u = s.u * one - s.p * x - s.q * y;
    const float ux = s.u * x - s.p * xx - s.q * xy;
    const float uy = s.u * y - s.p * xy - s.q * yy;
    const float v = s.v * one - s.r * y;
    const float vy = s.v * y - s.r * yy;
    // The kernels' p, q, r are kCholeskyScale times those of the input.
    constexpr float inverse = 1.0f / kCholeskyScale;
    sums[0] = -inverse * inverse * (s.p * u);
    sums[1] = -inverse * inverse * (s.q * u + s.r * v);
    sums[2] = -inverse * (s.x * u - ux);
    sums[3] = -inverse * (s.y * u - uy);
    sums[4] = -inverse * (s.y * v - vy);
    sums[5] = one * Exp2(-s.log2_opacity);
  }
};

// A Gaussian's gradient is the sum over its slots, in their order.
struct SumSlots {
  const int2* spans;            // [images * gaussians]
  const float* slot_gradients;  // [images * capacity, values]
  int features;                 // K
  float* geometry_gradient;     // [images * gaussians, 8]
  float* feature_gradient;      // [images * gaussians, K]
  SPLAT_HD void operator()(int64_t i) const {
    // One thread per stored number: the eight of the geometry, of which the last two have none.
    const int stored = 8 + features;
    const int64_t gaussian = i / stored;
    const int column = static_cast<int>(i % stored);
    const int value = column < 8 ? column : column - 8 + kGeometryGradients;
    const int values = kGeometryGradients + features;
    float sum = 0.0f;
    if (column < kGeometryGradients || column >= 8) {
      const int2 span = spans[gaussian];
      for (int64_t slot = span.x; slot < span.y; ++slot) sum += slot_gradients[slot * values + value];
    }
    if (column < 8) {
      geometry_gradient[gaussian * 8 + column] = sum;
    } else {
      feature_gradient[gaussian * features + column - 8] = sum;
    }
  }
};

template <int K, class Device>
void Forward(Device& device, int64_t tiles, const Composite& in, float4* out, float* alpha,
             float* transmittance, int* last) {
  device.EachWarp(tiles, ForwardTile<K>{in, out, alpha, transmittance, last});
}

template <int K, class Device>
void Backward(Device& device, int64_t tiles, int64_t splats, int64_t slots, const Composite& in,
              const int2* spans, const float* transmittance, const int* last,
              const float4* out_gradient, const float* alpha_gradient, float* geometry_gradient,
              float* feature_gradient) {
  using Tile = BackwardTile<K>;
  auto* slot_gradients = device.template Scratch<float>(slots * Tile::kValues);
  device.EachWarp(tiles, Tile{in, transmittance, last, out_gradient, alpha_gradient, slot_gradients});
  device.Each(splats * (8 + K),
              SumSlots{spans, slot_gradients, K, geometry_gradient, feature_gradient});
}

}  // namespace splat
