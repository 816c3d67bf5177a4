"use strict";
// Gaussians to pixels with WebGL2, by the contract of kernels/: the projection of projection.py with
// 0.3 pixels^2 of blur, alpha of at most 0.99 and at least 1/255, blended front to back.

const VERTEX = `#version 300 es
precision highp float;
precision highp sampler2D;
precision highp int;
uniform sampler2D gaussians; // 4 texels each: mean, opacity; quaternion wxyz; scale, r; g, b
uniform mat4 view; // world to camera, OpenCV axes
uniform vec4 K; // fx, fy, cx, cy in pixels
uniform vec2 size;
in uint index;
out vec2 u;
flat out vec4 rgba;

void main() {
  ivec2 at = ivec2(int(index % 256u) * 4, int(index / 256u));
  vec4 t0 = texelFetch(gaussians, at, 0);
  vec4 q = texelFetch(gaussians, at + ivec2(1, 0), 0);
  vec4 t2 = texelFetch(gaussians, at + ivec2(2, 0), 0);
  vec4 t3 = texelFetch(gaussians, at + ivec2(3, 0), 0);
  gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
  float opacity = t0.w;
  vec3 p = (view * vec4(t0.xyz, 1.0)).xyz;
  if (p.z < 0.01 || opacity < 1.0 / 255.0) return;
  vec2 xy = p.xy / p.z;
  vec2 margin = 0.15 * size / K.xy;
  vec2 j = clamp(xy, -K.zw / K.xy - margin, (size - K.zw) / K.xy + margin);
  float w = q.x, x = q.y, y = q.z, z = q.w;
  mat3 R = mat3(
    1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y + w * z), 2.0 * (x * z - w * y),
    2.0 * (x * y - w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z + w * x),
    2.0 * (x * z + w * y), 2.0 * (y * z - w * x), 1.0 - 2.0 * (x * x + y * y));
  mat3 axes = mat3(view) * R;
  axes = mat3(axes[0] * t2.x, axes[1] * t2.y, axes[2] * t2.z);
  vec3 r0 = vec3(axes[0].x, axes[1].x, axes[2].x);
  vec3 r1 = vec3(axes[0].y, axes[1].y, axes[2].y);
  vec3 r2 = vec3(axes[0].z, axes[1].z, axes[2].z);
  vec3 m0 = K.x / p.z * (r0 - j.x * r2);
  vec3 m1 = K.y / p.z * (r1 - j.y * r2);
  float xx = dot(m0, m0) + 0.3, yy = dot(m1, m1) + 0.3, cross_ = dot(m0, m1);

  // The ellipse's axes, and how far alpha stays at 1/255 or more along them.
  float middle = 0.5 * (xx + yy);
  float apart = length(vec2(0.5 * (xx - yy), cross_));
  float major = middle + apart;
  float minor = max(middle - apart, 0.3);
  vec2 along = abs(cross_) > 1e-12 ? normalize(vec2(cross_, major - xx))
    : (xx >= yy ? vec2(1, 0) : vec2(0, 1));
  float reach = sqrt(2.0 * log(255.0 * opacity));
  vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 2.0 - 1.0;
  u = corner * reach;
  vec2 pixel = K.xy * xy + K.zw
    + u.x * sqrt(major) * along + u.y * sqrt(minor) * vec2(-along.y, along.x);
  rgba = vec4(t2.w, t3.xy, opacity);
  gl_Position = vec4(2.0 * pixel.x / size.x - 1.0, 1.0 - 2.0 * pixel.y / size.y, 0.0, 1.0);
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec2 u;
flat in vec4 rgba;
out vec4 color;
void main() {
  float alpha = rgba.a * exp(-0.5 * dot(u, u));
  if (alpha < 1.0 / 255.0) discard;
  alpha = min(alpha, 0.99);
  color = vec4(rgba.rgb * alpha, alpha);
}`;

const FULL_SCREEN = `#version 300 es
void main() {
  gl_Position = vec4(4 * (gl_VertexID & 1) - 1, 2 * (gl_VertexID & 2) - 1, 0, 1);
}`;

const OVER_BACKGROUND = `#version 300 es
precision highp float;
uniform sampler2D blended;
uniform vec3 background;
out vec4 color;
void main() {
  vec4 sum = texelFetch(blended, ivec2(gl_FragCoord.xy), 0);
  color = vec4(sum.rgb + (1.0 - sum.a) * background, 1.0);
}`;

class Renderer {
  constructor(canvas) {
    this.canvas = canvas;
    const options = { alpha: false, antialias: false, depth: false, powerPreference: "high-performance" };
    const gl = (this.gl = canvas.getContext("webgl2", options));
    if (!gl) throw new Error("This browser has no WebGL2, which the avatar is drawn with.");
    // Sums of thousands of splats want more than 8 bits.
    const wide = gl.getExtension("EXT_color_buffer_float") ||
      gl.getExtension("EXT_color_buffer_half_float");
    this.format = wide ? gl.RGBA16F : gl.RGBA8;
    this.splats = program(gl, VERTEX, FRAGMENT);
    this.finish = program(gl, FULL_SCREEN, OVER_BACKGROUND);
    this.vertices = gl.createVertexArray();
    this.nothing = gl.createVertexArray();
    this.indices = gl.createBuffer();
    gl.bindVertexArray(this.vertices);
    gl.bindBuffer(gl.ARRAY_BUFFER, this.indices);
    const index = gl.getAttribLocation(this.splats.handle, "index");
    gl.enableVertexAttribArray(index);
    gl.vertexAttribIPointer(index, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(index, 1);
    this.table = texture(gl);
    this.blended = texture(gl);
    this.frame = gl.createFramebuffer();
    this.count = 0;
    this.tableRows = 0;
  }

  // 16 floats a Gaussian, as rig.js packs them.
  setGaussians(packed) {
    const gl = this.gl;
    const rows = Math.ceil(packed.length / 16 / 256);
    const padded = new Float32Array(rows * 256 * 16);
    padded.set(packed);
    gl.bindTexture(gl.TEXTURE_2D, this.table);
    if (rows !== this.tableRows) {
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, 1024, rows, 0, gl.RGBA, gl.FLOAT, padded);
      this.tableRows = rows;
    } else {
      gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, 1024, rows, gl.RGBA, gl.FLOAT, padded);
    }
  }

  setOrder(order) {
    const gl = this.gl;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.indices);
    gl.bufferData(gl.ARRAY_BUFFER, order, gl.DYNAMIC_DRAW);
    this.count = order.length;
  }

  // view: world to camera, rows; K: [fx, fy, cx, cy] in pixels of the canvas.
  draw(view, K, background) {
    const { gl, canvas } = this;
    const { width, height } = canvas;
    if (this.width !== width || this.height !== height) {
      [this.width, this.height] = [width, height];
      gl.bindTexture(gl.TEXTURE_2D, this.blended);
      const half = this.format === gl.RGBA16F;
      gl.texImage2D(gl.TEXTURE_2D, 0, this.format, width, height, 0, gl.RGBA,
        half ? gl.HALF_FLOAT : gl.UNSIGNED_BYTE, null);
      gl.bindFramebuffer(gl.FRAMEBUFFER, this.frame);
      gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, this.blended, 0);
    }
    gl.viewport(0, 0, width, height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.frame);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.enable(gl.BLEND);
    // Front to back: what is there covers what comes.
    gl.blendFunc(gl.ONE_MINUS_DST_ALPHA, gl.ONE);
    gl.useProgram(this.splats.handle);
    gl.bindTexture(gl.TEXTURE_2D, this.table);
    gl.uniformMatrix4fv(this.splats.at("view"), true, view.flat());
    gl.uniform4fv(this.splats.at("K"), K);
    gl.uniform2f(this.splats.at("size"), width, height);
    gl.bindVertexArray(this.vertices);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.count);
    gl.disable(gl.BLEND);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.useProgram(this.finish.handle);
    gl.bindTexture(gl.TEXTURE_2D, this.blended);
    gl.uniform3fv(this.finish.at("background"), background);
    gl.bindVertexArray(this.nothing);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }
}

function texture(gl) {
  const made = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, made);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE);
  return made;
}

function program(gl, vertex, fragment) {
  const handle = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(handle, shader);
  }
  gl.linkProgram(handle);
  if (!gl.getProgramParameter(handle, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(handle));
  const places = {};
  return { handle, at: (name) => (places[name] ??= gl.getUniformLocation(handle, name)) };
}
