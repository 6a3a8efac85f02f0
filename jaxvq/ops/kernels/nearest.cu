// The nearest codebook vector of each point, by the matrix units.
//
// A score is |c|^2 / 2 - x.c. A warp keeps the features of 16 * ROW_TILES points in registers and runs through the
// codebook, 8 vectors (a tile) at a time.
//
// With PASSES 3 a value is split in two half-precision numbers, and x.c = hi.hi + lo.hi + hi.lo has float32's digits.
// The least score and which group of tiles had it are kept; at the end the lane that had it compares its vectors of
// the group again, in float32 and by differences. With PASSES 1 values are rounded to half precision, and the least
// score decides.
//
// A point with NaN has only scores of NaN, which are less than nothing: its code stays 0.
//
// Compiled with: DIM, PASSES, STEPS (columns of features / 16), ROW_TILES, CHUNK (tiles staged at once), GROUP, WARPS
// (of a block).

static_assert(CHUNK % GROUP == 0, "a group must end where a chunk ends");

#define POINTS_PER_BLOCK (WARPS * ROW_TILES * 16)

__device__ __forceinline__ unsigned short as_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float as_float(unsigned short half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}

__device__ __forceinline__ unsigned feature(const float* __restrict__ points, int point, int column, int count,
                                            float scale) {
  const int part = column / DIM;
  if (point >= count || part >= PASSES) return 0;
  const float value = points[(long long)point * DIM + column % DIM] * scale;
  const float x = value > 65504.f ? 65504.f : value < -65504.f ? -65504.f : value;  // fminf would lose NaN
  const unsigned short high = as_half(x);
  return part == 1 ? as_half(x - as_float(high)) : high;
}

__device__ __forceinline__ unsigned two_features(const float* __restrict__ points, int point, int column, int count,
                                                 float scale) {
  return feature(points, point, column, count, scale) | feature(points, point, column + 1, count, scale) << 16;
}

__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
}

__device__ __forceinline__ float squared_distance(const float* __restrict__ a, const float* __restrict__ b) {
  float sum = 0;
  if constexpr (DIM % 4 == 0) {
#pragma unroll 4
    for (int j = 0; j < DIM / 4; ++j) {
      const float4 x = reinterpret_cast<const float4*>(a)[j], y = reinterpret_cast<const float4*>(b)[j];
      sum += (x.x - y.x) * (x.x - y.x) + (x.y - y.y) * (x.y - y.y);
      sum += (x.z - y.z) * (x.z - y.z) + (x.w - y.w) * (x.w - y.w);
    }
  } else {
#pragma unroll 4
    for (int j = 0; j < DIM; ++j) sum += (a[j] - b[j]) * (a[j] - b[j]);
  }
  return sum;
}

// table: [tiles, STEPS, 32, 2], the negative codebook in half precision, as the lanes of a warp need it.
// halves: [tiles * 8], half the squared lengths; infinite for padding. sizes: points that count, tiles, vectors.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) nearest(
    const float* __restrict__ points, const float* __restrict__ codebook, const uint2* __restrict__ table,
    const float* __restrict__ halves, const float* __restrict__ scales, const int* __restrict__ sizes,
    int* __restrict__ codes) {
  __shared__ __align__(16) uint2 staged[2][CHUNK * STEPS * 32];
  __shared__ __align__(16) float staged_halves[2][CHUNK * 8];
  const int count = sizes[0], tiles = sizes[1], entries = sizes[2];
  const float scale = scales[0];
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int first = blockIdx.x * POINTS_PER_BLOCK + threadIdx.x / 32 * (ROW_TILES * 16) + lane / 4;
  if (blockIdx.x * POINTS_PER_BLOCK >= count) return;

  unsigned a[ROW_TILES][STEPS][4];
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[r][s][i] = two_features(points, first + r * 16 + i % 2 * 8, s * 16 + quad * 2 + i / 2 * 8, count, scale);

  auto stage = [&](int chunk) {
    const char* from = reinterpret_cast<const char*>(table + (long long)chunk * CHUNK * STEPS * 32);
    char* to = reinterpret_cast<char*>(staged[chunk % 2]);
    for (int i = threadIdx.x * 16; i < CHUNK * STEPS * 256; i += WARPS * 32 * 16) copy16(to + i, from + i);
    const int part = threadIdx.x * 4;
    if (part < CHUNK * 8) copy16(staged_halves[chunk % 2] + part, halves + chunk * CHUNK * 8 + part);
    asm volatile("cp.async.commit_group;");
  };

  float best[ROW_TILES][2], least[ROW_TILES][2];
  int group[ROW_TILES][2];
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) best[r][h] = least[r][h] = __int_as_float(0x7f800000), group[r][h] = 0;

  const int chunks = tiles / CHUNK;
  stage(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    if (chunk + 1 < chunks) stage(chunk + 1);
    const uint2* b = staged[chunk % 2];
    const float2* half = reinterpret_cast<const float2*>(staged_halves[chunk % 2]);
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) {
      const float2 start = half[t * 4 + quad];
      float score[ROW_TILES][4];
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) score[r][0] = score[r][2] = start.x, score[r][1] = score[r][3] = start.y;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        const uint2 fragment = b[(t * STEPS + s) * 32 + lane];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) multiply(score[r], a[r][s], fragment);
      }
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        if constexpr (PASSES == 1) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (score[r][i] < best[r][i / 2]) {
              best[r][i / 2] = score[r][i];
              group[r][i / 2] = (chunk * CHUNK + t) * 8 + quad * 2 + i % 2;
            }
          continue;
        }
        least[r][0] = fminf(least[r][0], fminf(score[r][0], score[r][1]));
        least[r][1] = fminf(least[r][1], fminf(score[r][2], score[r][3]));
        if (t % GROUP == GROUP - 1) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (least[r][h] < best[r][h]) best[r][h] = least[r][h], group[r][h] = (chunk * CHUNK + t) / GROUP;
            least[r][h] = __int_as_float(0x7f800000);
          }
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int point = first + r * 16 + h * 8;
      float value = best[r][h];
      int where = group[r][h];
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(0xffffffff, value, step);
        const int there = __shfl_xor_sync(0xffffffff, where, step);
        if (other < value || (other == value && there < where)) value = other, where = there;
      }
      if constexpr (PASSES == 1) {
        if (quad == 0 && point < count) codes[point] = where;
        continue;
      }
      float nearest_so_far = __int_as_float(0x7f800000);
      int code = where * GROUP * 8;
      // Only the lanes that had the least score look again, each at its own columns of the group's tiles.
      if (point < count && best[r][h] == value && group[r][h] == where)
#pragma unroll
        for (int i = 0; i < GROUP * 2; ++i) {
          const int c = (where * GROUP + i / 2) * 8 + quad * 2 + i % 2;
          if (c < entries) {
            const float distance = squared_distance(points + (long long)point * DIM, codebook + (long long)c * DIM);
            if (distance < nearest_so_far) nearest_so_far = distance, code = c;
          }
        }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(0xffffffff, nearest_so_far, step);
        const int there = __shfl_xor_sync(0xffffffff, code, step);
        if (other < nearest_so_far || (other == nearest_so_far && there < code)) nearest_so_far = other, code = there;
      }
      if (quad == 0 && point < count) codes[point] = code;
    }
}
