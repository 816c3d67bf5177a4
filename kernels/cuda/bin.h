// Which Gaussians each tile composites, in order of depth.
//
// Gaussians are sorted by (image, depth) first. Each is given, in that order, room for as many
// *slots* as there are tiles in its bounding box: `binning.tile_boxes` counts them, as for every
// backend. It then fills one slot per tile that it touches, and a stable sort of the slots by tile
// alone leaves every tile's slots in order of depth: exact depths, yet keys of 32 bits. A
// Gaussian's slots are neighbours, which is what lets the backward pass sum its gradients without
// atomics.
#pragma once

#include "splat.h"

namespace splat {

struct Binning {
  // in
  const float4* geometry;  // [images * gaussians, 2]
  const int4* boxes;       // [images * gaussians] first tile (x, y), number of tiles (x, y)
  int images, gaussians, rows, columns;
  int64_t capacity;  // slots of each image
  // out
  int* slots;          // [images * capacity] slot numbers, by tile, then depth
  int* slot_gaussian;  // [images * capacity] the Gaussian (of all images) that owns a slot
  int2* ranges;        // [images, rows, columns] begin and end in `slots`
  int2* spans;         // [images * gaussians] begin and end of a Gaussian's slots
  int* overflow;       // [images] slots that did not fit
};

// Depth in front of the camera is positive, so its bits order as it does. What lies behind is
// culled and may sort anywhere within its image.
struct DepthKeys {
  Binning bin;
  uint64_t* keys;
  int* index;
  SPLAT_HD void operator()(int64_t i) const {
    union {
      float value;
      uint32_t bits;
    } depth = {Load(bin.geometry, i).depth};
    keys[i] = (static_cast<uint64_t>(i / bin.gaussians) << 32) | depth.bits;
    index[i] = static_cast<int>(i);
  }
};

struct CountBoxes {
  Binning bin;
  const int* order;
  int64_t* counts;
  SPLAT_HD void operator()(int64_t rank) const {
    const int4 box = bin.boxes[order[rank]];
    counts[rank] = static_cast<int64_t>(box.z) * box.w;
  }
};

// How many tiles the boxes of an image have up to and including that of `rank`.
struct Ends {
  const int64_t* sums;  // inclusive running sum over all images
  int gaussians;
  SPLAT_HD int64_t operator()(int64_t image, int64_t rank) const {
    const int64_t first = image * gaussians;
    return At(rank) - At(first - 1);
  }
  SPLAT_HD int64_t At(int64_t rank) const { return rank < 0 ? 0 : sums[rank]; }
};

// Slots past an image's capacity are not written: those of its farthest Gaussians.
struct WriteSlots {
  Binning bin;
  const int* order;
  Ends ends;
  uint32_t* keys;
  int* slots;
  SPLAT_HD void operator()(int64_t rank) const {
    const int gaussian = order[rank];
    const int64_t image = gaussian / bin.gaussians;
    const int64_t begin = Slot(image, rank - 1), end = Slot(image, rank);
    const Ellipse ellipse(Load(bin.geometry, gaussian));
    const int4 box = bin.boxes[gaussian];
    int64_t slot = begin;
    for (int row = box.y; row < box.y + box.w; ++row) {
      const Tiles columns = ellipse.Columns(row, box.x, box.x + box.z - 1);
      for (int column = columns.first; column <= columns.last && slot < end; ++column, ++slot) {
        keys[slot] = static_cast<uint32_t>((image * bin.rows + row) * bin.columns + column);
        slots[slot] = static_cast<int>(slot);
        bin.slot_gaussian[slot] = gaussian;
      }
    }
    bin.spans[gaussian] = {static_cast<int>(begin), static_cast<int>(slot)};
  }
  // One past the room of `rank`, among the slots of all images.
  SPLAT_HD int64_t Slot(int64_t image, int64_t rank) const {
    const int64_t end = ends(image, rank);
    return image * bin.capacity + (end < bin.capacity ? end : bin.capacity);
  }
};

struct FindRanges {
  Binning bin;
  const uint32_t* keys;  // sorted; slots never written hold the largest key
  SPLAT_HD void operator()(int64_t tile) const {
    bin.ranges[tile] = {LowerBound(static_cast<uint32_t>(tile)),
                        LowerBound(static_cast<uint32_t>(tile) + 1)};
  }
  SPLAT_HD int LowerBound(uint32_t key) const {
    int64_t low = 0, high = bin.images * bin.capacity;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return static_cast<int>(low);
  }
};

struct CountOverflow {
  Binning bin;
  Ends ends;
  SPLAT_HD void operator()(int64_t image) const {
    const int64_t dropped = ends(image, (image + 1) * bin.gaussians - 1) - bin.capacity;
    bin.overflow[image] =
        static_cast<int>(dropped < 0 ? 0 : dropped < INT32_MAX ? dropped : INT32_MAX);
  }
};

inline int BitsOf(uint64_t value) {
  int bits = 0;
  for (; value > 0; value >>= 1) ++bits;
  return bits;
}

template <class Device>
void Bin(Device& device, const Binning& bin) {
  const int64_t splats = static_cast<int64_t>(bin.images) * bin.gaussians;
  const int64_t tiles = static_cast<int64_t>(bin.images) * bin.rows * bin.columns;

  auto* depth_keys = device.template Scratch<uint64_t>(splats);
  auto* sorted_depth_keys = device.template Scratch<uint64_t>(splats);
  auto* index = device.template Scratch<int>(splats);
  auto* order = device.template Scratch<int>(splats);
  device.Each(splats, DepthKeys{bin, depth_keys, index});
  device.SortPairs(depth_keys, sorted_depth_keys, index, order, splats,
                   32 + BitsOf(bin.images - 1));

  auto* counts = device.template Scratch<int64_t>(splats);
  auto* sums = device.template Scratch<int64_t>(splats);
  const Ends ends{sums, bin.gaussians};
  device.Each(splats, CountBoxes{bin, order, counts});
  device.InclusiveSum(counts, sums, splats);
  device.Each(bin.images, CountOverflow{bin, ends});

  // All bits set sorts behind every tile, as the sort looks at enough bits to hold `tiles` itself.
  const int64_t room = bin.images * bin.capacity;
  auto* keys = device.template Scratch<uint32_t>(room);
  auto* sorted_keys = device.template Scratch<uint32_t>(room);
  auto* slots = device.template Scratch<int>(room);
  device.Fill(keys, 0xFF, room * sizeof(uint32_t));
  device.Each(splats, WriteSlots{bin, order, ends, keys, slots});
  device.SortPairs(keys, sorted_keys, slots, bin.slots, room, BitsOf(tiles));
  device.Each(tiles, FindRanges{bin, sorted_keys});
}

}  // namespace splat
