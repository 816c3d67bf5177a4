"use strict";
// Runs in a worker: expressions to Gaussians, and Gaussians to their order from front to back.
// The same arithmetic as rig.py and model/gaussians.py; see there.

const SH_C0 = 0.28209479;
const CHANNELS = 14; // colours 3, scales 3, offsets 3, opacity 1, rotation 4
const FLOATS = 16; // of a Gaussian, as the renderer reads it: mean, opacity; quaternion; scale, rgb

class Rig {
  constructor(head, arrays) {
    Object.assign(this, head, arrays);
    this.texels = this.height * this.width;
    this.rank = this.components.length / (CHANNELS * this.texels);
    this.count = this.index.length;
    this.rows = interpolation(this.grid, this.height);
    this.columns = interpolation(this.grid, this.width);
    this.maps = new Float32Array(CHANNELS * this.texels);
    this.gaussians = new Float32Array(FLOATS * this.count);
    this.keys = new Uint16Array(this.count);
    this.buckets = new Uint32Array(65537);
  }

  // Coefficients of sliders (name -> value) and, if any, of a clip's frame, which may lie between.
  coefficients(values, clip) {
    const total = new Float64Array(this.rank);
    const add = (row, weight) => {
      for (let k = 0; k < this.rank; k++) total[k] += weight * this.coefs[row * this.rank + k];
    };
    for (const slider of this.sliders) {
      const value = values[slider.name] || 0;
      if (!value) continue;
      // The knots, with rest among them: its row is null.
      const knots = slider.knots.map((at, i) => [at, slider.row + i]).concat([[0, null]]);
      knots.sort((a, b) => a[0] - b[0]);
      let right = knots.findIndex(([at]) => at >= value);
      if (right < 0) right = knots.length - 1;
      const left = Math.max(right - 1, 0);
      const gap = knots[right][0] - knots[left][0];
      const part = gap ? Math.min(Math.max((value - knots[left][0]) / gap, 0), 1) : 1;
      if (knots[left][1] !== null) add(knots[left][1], 1 - part);
      if (knots[right][1] !== null) add(knots[right][1], part);
    }
    for (const [a, endA, b, endB, row] of this.pairs) {
      const outA = Math.max((values[a] || 0) / endA, 0);
      const outB = Math.max((values[b] || 0) / endB, 0);
      if (outA && outB) add(row, outA * outB);
    }
    if (clip) {
      const { row, frames } = this.clips[clip.number];
      const at = Math.min(Math.max(clip.frame, 0), frames - 1);
      const first = Math.floor(at);
      add(row + first, 1 - (at - first));
      if (first + 1 < frames) add(row + first + 1, at - first);
    }
    return total;
  }

  // Adds the maps up and samples the Gaussians from them.
  pose(values, clip) {
    const { maps, texels, components, neutral } = this;
    for (let c = 0; c < CHANNELS; c++) {
      for (let p = c * texels; p < (c + 1) * texels; p++) maps[p] = neutral[p] * this.neutralSteps[c];
    }
    this.coefficients(values, clip).forEach((coefficient, k) => {
      if (!coefficient) return;
      for (let c = 0; c < CHANNELS; c++) {
        const factor = coefficient * this.steps[k * CHANNELS + c];
        if (!factor) continue;
        const from = (k * CHANNELS + c) * texels;
        const to = c * texels;
        for (let p = 0; p < texels; p++) maps[to + p] += factor * components[from + p];
      }
    });
    this.sample();
  }

  sample() {
    const { maps, texels, gaussians, rows, columns, biases, width } = this;
    const v = new Float64Array(CHANNELS);
    for (let g = 0; g < this.count; g++) {
      const row = Math.floor(this.index[g] / this.grid);
      const column = this.index[g] % this.grid;
      const top = rows.first[row] * width;
      const bottom = rows.second[row] * width;
      const left = columns.first[column];
      const right = columns.second[column];
      const [y0, y1] = [rows.weights[2 * row], rows.weights[2 * row + 1]];
      const [x0, x1] = [columns.weights[2 * column], columns.weights[2 * column + 1]];
      for (let c = 0; c < CHANNELS; c++) {
        const at = c * texels;
        v[c] = biases[c] +
          y0 * (x0 * maps[at + top + left] + x1 * maps[at + top + right]) +
          y1 * (x0 * maps[at + bottom + left] + x1 * maps[at + bottom + right]);
      }
      const to = g * FLOATS;
      const length = Math.max(Math.hypot(v[10], v[11], v[12], v[13]), 1e-12);
      for (let i = 0; i < 3; i++) {
        const position = this.positions[3 * g + i] * this.positionSteps[i] + this.positionLows[i];
        gaussians[to + i] = position + this.offsetRange * (sigmoid(v[6 + i]) - 0.5);
        gaussians[to + 8 + i] = Math.min(Math.exp(v[3 + i]), this.maxScale);
        gaussians[to + 11 + i] = Math.max(SH_C0 * v[i] + 0.5, 0);
      }
      gaussians[to + 3] = sigmoid(v[9]);
      for (let i = 0; i < 4; i++) gaussians[to + 4 + i] = v[10 + i] / length;
    }
  }

  // Gaussians by camera z, nearest first (a counting sort; 65,536 steps of depth). `axis` is the
  // row of the view matrix that gives z.
  order(axis) {
    const { gaussians, keys, buckets, count } = this;
    const depths = new Float32Array(count);
    let low = Infinity;
    let high = -Infinity;
    for (let g = 0; g < count; g++) {
      const at = g * FLOATS;
      const z = axis[0] * gaussians[at] + axis[1] * gaussians[at + 1] + axis[2] * gaussians[at + 2];
      depths[g] = z;
      if (z < low) low = z;
      if (z > high) high = z;
    }
    const scale = 65535 / Math.max(high - low, 1e-9);
    buckets.fill(0);
    for (let g = 0; g < count; g++) {
      keys[g] = (depths[g] - low) * scale;
      buckets[keys[g] + 1]++;
    }
    for (let b = 0; b < 65536; b++) buckets[b + 1] += buckets[b];
    const order = new Uint32Array(count);
    for (let g = 0; g < count; g++) order[buckets[keys[g]]++] = g;
    return order;
  }
}

// Weights that sample `size` texels at linspace(-1, 1, samples), 0 beyond the rim: see resampling.py.
function interpolation(samples, size) {
  const first = new Uint32Array(samples);
  const second = new Uint32Array(samples);
  const weights = new Float32Array(2 * samples);
  for (let i = 0; i < samples; i++) {
    const at = ((2 * i / (samples - 1)) * size - 1) / 2;
    const low = Math.floor(at);
    for (const [side, texel] of [low, low + 1].entries()) {
      const inside = texel >= 0 && texel < size;
      (side ? second : first)[i] = inside ? texel : 0;
      weights[2 * i + side] = inside ? Math.max(0, 1 - Math.abs(at - texel)) : 0;
    }
  }
  return { first, second, weights };
}

function sigmoid(x) {
  return 1 / (1 + Math.exp(-x));
}

let rig = null;
onmessage = ({ data }) => {
  if (data.head) {
    rig = new Rig(data.head, data.arrays);
    return;
  }
  const reply = { id: data.id };
  if (data.pose) {
    rig.pose(data.pose.values, data.pose.clip);
    reply.gaussians = rig.gaussians.slice();
  }
  reply.order = rig.order(data.axis);
  postMessage(reply, [reply.order.buffer, ...(reply.gaussians ? [reply.gaussians.buffer] : [])]);
};
