// Sums over the pixels of the absolute values of what each adds to the projected means' gradients.
//
// A pass of its own, which only those make who ask for it: the backward pass keeps its registers.
// And it goes through all features at once, however many: absolute values don't add up over chunks.
#pragma once

#include "composite.h"

namespace splat {

// Walks a tile as `BackwardTile` does, with the same two halves to a batch.
struct AbsoluteTile {
  Composite in;                 // features [images * gaussians, quads]
  int quads;                    // a quarter of the number of features
  const float* transmittance;   // [images, height, width] as the forward pass left it
  const int* last;              // [images, height, width]
  const float4* out_gradient;   // [images, height, width, quads]
  const float* alpha_gradient;  // [images, height, width]
  float2* slot_sums;            // [images * capacity]

  struct Shared {
    alignas(16) float2 u[kBackwardBatch][kStride];  // a lane's two pixels together
    float2 sums[2][kBackwardBatch];
    Splat splat[kBackwardBatch];
    int gaussian[kBackwardBatch];
    int slot[kBackwardBatch];
  };

  struct Pixel : WayBack {
    const float4* gradient;
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
        const int64_t at = inside ? ImagePixel(place, 2 * lane + i, in.width, in.height) : 0;
        pixel.gradient = out_gradient + at * quads;
        pixel.transmittance = transmittance[at];
        pixel.alpha_gradient = alpha_gradient[at];
        pixel.behind = 0.0f;
        pixel.last = inside ? last[at] : 0;
      }
    });
    const int reached = warp.Max([&](int lane) {
      const Pixel(&pixel)[2] = pixels[lane];
      return pixel[0].last > pixel[1].last ? pixel[0].last : pixel[1].last;
    });

    warp.Each([&](int lane) {
      for (int i = range.x + reached + lane; i < range.y; i += kLanes) {
        slot_sums[in.slots[i]] = {0.0f, 0.0f};
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
        shared.gaussian[lane] = gaussian;
        shared.splat[lane] = Prepare(Load(in.geometry, gaussian), place.CentreX(), place.CentreY());
      });
      warp.Each([&](int lane) {
        for (int j = count - 1; j >= 0; --j) {
          const Splat splat = shared.splat[j];
          float u[2] = {0.0f, 0.0f};
          SPLAT_UNROLL
          for (int i = 0; i < 2; ++i) {
            Pixel& pixel = pixels[lane][i];
            const float strength = LaneStrength(splat, lane, i);
            if (strength < kMinAlpha || begin + j >= pixel.last) continue;
            float w;
            pixel.Pass(strength, Light(shared.gaussian[j], pixel), u[i], w);
          }
          shared.u[j][lane] = {u[0], u[1]};
        }
      });
      warp.Each([&](int lane) {
        const int j = lane % kBackwardBatch, half = lane / kBackwardBatch;
        if (j < count) shared.sums[half][j] = SumPixels(shared.splat[j], shared.u[j], half);
      });
      warp.Each([&](int lane) {
        if (lane >= count) return;
        const float2 a = shared.sums[0][lane], b = shared.sums[1][lane];
        slot_sums[shared.slot[lane]] = {a.x + b.x, a.y + b.y};
      });
    }
  }

  SPLAT_HD float Light(int64_t gaussian, const Pixel& pixel) const {
    float light = pixel.alpha_gradient;
    for (int k = 0; k < quads; ++k) {
      const float4 a = in.features[gaussian * quads + k], b = pixel.gradient[k];
      light = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, light))));
    }
    return light;
  }

  // Over half of the tile's rows. By the centre the strength's logarithm has the gradient
  // -(p u, q u + r v), with u, v the pair's whitened offset.
  SPLAT_HD float2 SumPixels(const Splat& s, const float2 (&pairs)[kStride], int half) const {
    float2 sum = {0.0f, 0.0f};
    for (int row = half * kTile / 2; row < (half + 1) * kTile / 2; ++row) {
      float gradient[kTile];
      Unpack(reinterpret_cast<const float4*>(&pairs[row * kTile / 2]), gradient);
      const float y = PixelY(row * kTile);
      const float v = s.v - s.r * y;
      SPLAT_UNROLL
      for (int column = 0; column < kTile; ++column) {
        const float u = s.u - s.p * PixelX(column) - s.q * y;
        sum.x += fabsf(gradient[column] * (s.p * u));
        sum.y += fabsf(gradient[column] * (s.q * u + s.r * v));
      }
    }
    // The kernels' p, q, r are kCholeskyScale times those of the input.
    constexpr float scale = 1.0f / (kCholeskyScale * kCholeskyScale);
    return {scale * sum.x, scale * sum.y};
  }
};

// A Gaussian's sum is that over its slots, in their order.
struct SumAbsolute {
  const int2* spans;        // [images * gaussians]
  const float2* slot_sums;  // [images * capacity]
  float2* absolute;         // [images * gaussians]
  SPLAT_HD void operator()(int64_t gaussian) const {
    const int2 span = spans[gaussian];
    float2 sum = {0.0f, 0.0f};
    for (int64_t slot = span.x; slot < span.y; ++slot) {
      sum.x += slot_sums[slot].x;
      sum.y += slot_sums[slot].y;
    }
    absolute[gaussian] = sum;
  }
};

template <class Device>
void Absolute(Device& device, int64_t tiles, int64_t splats, int64_t slots, const Composite& in,
              int quads, const int2* spans, const float* transmittance, const int* last,
              const float4* out_gradient, const float* alpha_gradient, float2* absolute) {
  auto* slot_sums = device.template Scratch<float2>(slots);
  device.EachWarp(tiles, AbsoluteTile{in, quads, transmittance, last, out_gradient, alpha_gradient,
                                      slot_sums});
  device.Each(splats, SumAbsolute{spans, slot_sums, absolute});
}

}  // namespace splat
