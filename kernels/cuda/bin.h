// Which Gaussians each tile composites, in order of depth.
//
// Gaussians are sorted by (image, depth) first; each then writes one *slot* per tile it touches,
// in that order, and a stable sort of the slots by tile alone leaves every tile's slots in order
// of depth: exact depths, yet keys of 32 bits. A Gaussian's slots are neighbours, which is what
// lets the backward pass sum its gradients without atomics.
#pragma once

#include "splat.h"

namespace splat {

struct Binning {
  // in
  const float4* geometry;  // [images * gaussians, 2]
  int images, gaussians, rows, columns;
  int64_t capacity;  // slots of all images together
  // out
  int* slots;          // [capacity] slot numbers, by tile, then depth
  int* slot_gaussian;  // [capacity] the Gaussian (of all images) that owns a slot
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

struct CountTiles {
  Binning bin;
  const int* order;
  int64_t* counts;
  SPLAT_HD void operator()(int64_t rank) const {
    const Ellipse ellipse(Load(bin.geometry, order[rank]));
    const Tiles rows = ellipse.Rows(bin.rows);
    int64_t count = 0;
    for (int row = rows.first; row <= rows.last; ++row) {
      const Tiles columns = ellipse.Columns(row, bin.columns);
      if (columns.last >= columns.first) count += columns.last - columns.first + 1;
    }
    counts[rank] = count;
  }
};

// Slots past the capacity are not written. Within an image those are the farthest Gaussians'.
struct WriteSlots {
  Binning bin;
  const int* order;
  const int64_t* ends;  // inclusive running sum of the counts
  uint32_t* keys;
  int* slots;
  SPLAT_HD void operator()(int64_t rank) const {
    const int gaussian = order[rank];
    const int64_t begin = Clip(rank == 0 ? 0 : ends[rank - 1]);
    const int64_t end = Clip(ends[rank]);
    bin.spans[gaussian] = {static_cast<int>(begin), static_cast<int>(end)};
    const Ellipse ellipse(Load(bin.geometry, gaussian));
    const Tiles rows = ellipse.Rows(bin.rows);
    const int64_t image = gaussian / bin.gaussians;
    int64_t slot = begin;
    for (int row = rows.first; row <= rows.last; ++row) {
      const Tiles columns = ellipse.Columns(row, bin.columns);
      for (int column = columns.first; column <= columns.last && slot < end; ++column, ++slot) {
        keys[slot] = static_cast<uint32_t>((image * bin.rows + row) * bin.columns + column);
        slots[slot] = static_cast<int>(slot);
        bin.slot_gaussian[slot] = gaussian;
      }
    }
  }
  SPLAT_HD int64_t Clip(int64_t slot) const { return slot < bin.capacity ? slot : bin.capacity; }
};

struct FindRanges {
  Binning bin;
  const uint32_t* keys;  // sorted; slots never written hold the largest key
  SPLAT_HD void operator()(int64_t tile) const {
    bin.ranges[tile] = {LowerBound(static_cast<uint32_t>(tile)),
                        LowerBound(static_cast<uint32_t>(tile) + 1)};
  }
  SPLAT_HD int LowerBound(uint32_t key) const {
    int64_t low = 0, high = bin.capacity;
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
  const int64_t* ends;
  SPLAT_HD void operator()(int64_t image) const {
    const int64_t begin = image == 0 ? 0 : ends[image * bin.gaussians - 1];
    const int64_t end = ends[(image + 1) * bin.gaussians - 1];
    const int64_t kept = Clip(end) - Clip(begin);
    const int64_t dropped = end - begin - kept;
    bin.overflow[image] = static_cast<int>(dropped < INT32_MAX ? dropped : INT32_MAX);
  }
  SPLAT_HD int64_t Clip(int64_t slot) const { return slot < bin.capacity ? slot : bin.capacity; }
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
  auto* ends = device.template Scratch<int64_t>(splats);
  device.Each(splats, CountTiles{bin, order, counts});
  device.InclusiveSum(counts, ends, splats);
  device.Each(bin.images, CountOverflow{bin, ends});

  // All bits set sorts behind every tile, as the sort looks at enough bits to hold `tiles` itself.
  auto* keys = device.template Scratch<uint32_t>(bin.capacity);
  auto* sorted_keys = device.template Scratch<uint32_t>(bin.capacity);
  auto* slots = device.template Scratch<int>(bin.capacity);
  device.Fill(keys, 0xFF, bin.capacity * sizeof(uint32_t));
  device.Each(splats, WriteSlots{bin, order, ends, keys, slots});
  device.SortPairs(keys, sorted_keys, slots, bin.slots, bin.capacity, BitsOf(tiles));
  device.Each(tiles, FindRanges{bin, sorted_keys});
}

}  // namespace splat
