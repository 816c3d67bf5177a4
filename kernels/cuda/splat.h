// What one Gaussian does to one pixel, and which pixels it can reach: arithmetic shared by every
// kernel, written for the GPU and for an ordinary host compiler alike.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SPLAT_HD __host__ __device__ __forceinline__
#define SPLAT_UNROLL _Pragma("unroll")
#else
#define SPLAT_HD inline
#define SPLAT_UNROLL
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
#endif

namespace splat {

constexpr int kTile = 8;  // pixels on a tile's side: a warp's 32 lanes hold two pixels each
constexpr float kMinAlpha = 1.0f / 255.0f;
constexpr float kMaxAlpha = 0.99f;
constexpr float kMinTransmittance = 1e-4f;
constexpr float kCholeskyScale = 0.8493218002880191f;  // sqrt(log2(e) / 2)

SPLAT_HD float Exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

SPLAT_HD float Reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

// A projected Gaussian as it arrives: eight floats, two 16-byte loads.
struct Projected {
  float x, y;     // centre, pixels
  float p, q, r;  // sigma = ((p dx + q dy)^2 + (r dy)^2) / 2 at (dx, dy) from the centre
  float opacity;
  float depth;
  float unused;
};

SPLAT_HD Projected Load(const float4* geometry, int64_t gaussian) {
  const float4 a = geometry[2 * gaussian];
  const float4 b = geometry[2 * gaussian + 1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// An inclusive range of tile columns; empty where last < first.
struct Tiles {
  int first, last;
};

// Tiles of `first` to `last` along an axis whose pixel centres meet [low, high]. Clamped as floats,
// so that no huge bound reaches an integer conversion.
SPLAT_HD Tiles TilesBetween(float low, float high, int first, int last) {
  const float from = ceilf((low - (kTile - 0.5f)) / kTile);
  const float to = floorf((high - 0.5f) / kTile);
  return {static_cast<int>(fminf(fmaxf(from, static_cast<float>(first)), last + 1.0f)),
          static_cast<int>(fminf(fmaxf(to, first - 1.0f), static_cast<float>(last)))};
}

// The ellipse where a drawn Gaussian's alpha reaches 1/255: of the tiles in its bounding box, those
// that it meets are the tiles that composite the Gaussian.
struct Ellipse {
  float x, y, p, q, r;
  float reach;   // sqrt(2 sigma) on the ellipse
  float height;  // half its height, pixels
  float peak;    // dy where it is rightmost; it is leftmost at -peak
  float slack;   // more than rounding can move an edge, pixels

  SPLAT_HD explicit Ellipse(const Projected& g) : x(g.x), y(g.y), p(g.p), q(g.q), r(g.r) {
    reach = sqrtf(2.0f * logf(g.opacity / kMinAlpha) + 1e-3f);
    height = reach / r;
    peak = -q * height / sqrtf(r * r + q * q);
    slack = 1e-2f + 1e-6f * (fabsf(x) + fabsf(y) + height * fabsf(q) / p);
  }

  // The tile columns, from `first` to `last`, that the ellipse meets within a tile row. What
  // a row's band cuts from an ellipse is convex, so its extent in x decides exactly; its right end
  // rises to one peak, so the peak clamped to the band is the rightmost place, and likewise left.
  SPLAT_HD Tiles Columns(int row, int first, int last) const {
    const float low = fmaxf(row * kTile + 0.5f - y, -height);
    const float high = fminf(row * kTile + (kTile - 0.5f) - y, height);
    const float right = fminf(fmaxf(peak, low), high);
    const float left = fminf(fmaxf(-peak, low), high);
    return TilesBetween(x + (-q * left - Chord(left)) / p - slack,
                        x + (-q * right + Chord(right)) / p + slack, first, last);
  }

  // Half the width at height dy, times p.
  SPLAT_HD float Chord(float dy) const {
    return sqrtf(fmaxf(reach * reach - (r * dy) * (r * dy), 0.0f));
  }
};

// A Gaussian as the compositing kernels keep it in shared memory, relative to a tile's centre and
// with its form scaled for powers of two: at a pixel (px, py) from the tile's centre,
// alpha = 2^(log2_opacity - (u - p px - q py)^2 - (v - r py)^2).
struct Splat {
  float x, y;  // centre, relative to the tile's
  float p, q, r;
  float u, v;  // the whitened offset at the tile's centre
  float log2_opacity;
};

SPLAT_HD Splat Prepare(const Projected& g, float tile_x, float tile_y) {
  const float x = g.x - tile_x, y = g.y - tile_y;
  const float p = kCholeskyScale * g.p, q = kCholeskyScale * g.q, r = kCholeskyScale * g.r;
  return {x, y, p, q, r, fmaf(p, x, q * y), r * y, log2f(g.opacity)};
}

// opacity * exp(-sigma) at a pixel. Fused operations are spelled out, so that the forward and the
// backward kernel round alike and agree on every threshold.
SPLAT_HD float Strength(const Splat& s, float pixel_x, float pixel_y) {
  const float v = fmaf(-s.r, pixel_y, s.v);
  const float u = fmaf(-s.p, pixel_x, fmaf(-s.q, pixel_y, s.u));
  return Exp2(fmaf(-u, u, fmaf(-v, v, s.log2_opacity)));
}

}  // namespace splat
