// x @ w for one row of x and vectors from one codebook, by tables of inner products.
//
// All that a vector can add to an output is its inner product with the inputs it meets. A block of threads writes the
// inner products of every vector with some inputs into a table in shared memory, by the matrix units, and then adds up
// what the codes of its outputs point at: a number for each code, where decoding would read a whole vector.
//
// A phase is what one table serves: SHARES units along the input side, one for each lane. If the table has room for
// 32 units, numbers lie such that every lane reads from a bank of its own whatever the codes are, two codes of its unit
// to a word. Otherwise those of a code lie together, and 32 / SHARES lanes have the same inputs and different outputs.
// The blocks of a cluster share the phases and the outputs, and add up at the end, in a fixed order. The words of the
// codes come by a ring of SPAN parts of shared memory.
//
// Vectors and x are float16 in there, scaled by powers of two: vectors to values below 64 by the largest finite one of
// the codebook (those below 2**-30 of it count as zero), x to less than 8 by its largest value in a block's part. So
// are their inner products; at most eight are added up in float16, and those sums in float32.
//
// Source: the distances by tables of Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", IEEE
// TPAMI 33(1), 2011.
//
// Compiled with: INPUTS, OUTPUTS, LENGTH (codes along the input side), BITS, STAGES, DIM, BFLOAT (16-bit type of x);
// ENTRIES of the codebook; VECTORS, SCALES (types, 0 for none); SCALE_STAGES; LANES, COLUMNS, OUT_WARPS, SPAN; K_BLOCKS
// (blocks of a cluster); TAKES (parts of the outputs that a cluster takes in turn). ROWS, K_WARPS and BLOCKS are 1.

#include "codes.cuh"

constexpr int CODES = 1 << BITS, SLOTS = SHARES * UNIT_CODES;  // of a phase
constexpr bool APART = LANES == 1;
constexpr int PHASES = (UNITS + SHARES * K_BLOCKS - 1) / (SHARES * K_BLOCKS);  // of a block
constexpr bool EXACT = LENGTH * DIM == INPUTS && LENGTH == PHASES * K_BLOCKS * SLOTS;
constexpr int CHAIN = 8;  // inner products that are added up in float16

// The table. In rows of codes two codes of a unit are a word of a lane; in rows of slots two neighbouring codes are.
constexpr int SHIFT = APART ? log2_of(2 * SLOTS) : 1, STAGE_BYTES = 2 * SLOTS * CODES;
constexpr int TABLE_BYTES = STAGES * STAGE_BYTES, ROW_BYTES = APART ? 2 * SLOTS : 2 * CODES;
__device__ constexpr int step_of(int code) { return APART ? code / 2 * 128 + code % 2 * 2 : code * ROW_BYTES; }

// The words that a warp looks up in a turn. Narrow rows are apart, so that lanes read from different banks.
constexpr int WORD_ROWS_OF_PHASE = SHARES * UNIT_WORDS, ROW_WORDS = OUTS * STAGES;
constexpr int PITCH = ROW_WORDS * 4 + (ROW_WORDS < 32 && ROW_WORDS % 8 == 0 ? 16 : 0);
constexpr int PART_BYTES = (WORD_ROWS_OF_PHASE * PITCH + 15) / 16 * 16;
constexpr int COPIED = OUTPUTS * STAGES % 4 == 0 && ROW_WORDS % 4 == 0 ? 4 : 1;  // words at a time
constexpr int ROW_COPIES = ROW_WORDS / COPIED, COPIES_OF_LANE = (WORD_ROWS_OF_PHASE * ROW_COPIES + 31) / 32;
constexpr bool EVEN = 32 % ROW_COPIES == 0 || ROW_COPIES % 32 == 0;
constexpr bool WHOLE = OUTPUTS % BLOCK_OUTS == 0 && WORD_ROWS == PHASES * K_BLOCKS * WORD_ROWS_OF_PHASE;

// Fragments of vectors that a warp holds: 16 rows of codes to a tile, or eight tiles of eight codes.
constexpr int HELD = APART ? 16 : 64, PIECES = STAGES * CODES / HELD, WARPS = OUT_WARPS;
constexpr int MINE = (PIECES + WARPS - 1) / WARPS, SHARING = PIECES < WARPS ? WARPS / PIECES : 1;
constexpr int FRAGMENTS = APART ? 2 : 8;
static_assert(CODES % HELD == 0 && SLOTS % 16 == 0, "whole tiles");
static_assert(COLUMNS == 1 || COLUMNS % 2 == 0, "lanes share out columns by halves");
static_assert(ROWS == 1 && K_WARPS == 1 && DIM > 1 && DIM <= 8 && !GROUPED, "a row of x, one codebook");

#if K_BLOCKS > 1
#define IN_CLUSTERS __cluster_dims__(K_BLOCKS, 1, 1)
#else
#define IN_CLUSTERS
#endif

// All blocks of the cluster have come here, and each sees what the others have written before.
__device__ __forceinline__ void meet() {
#if K_BLOCKS > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ float read_of_block(const float* from, int block) {
#if K_BLOCKS > 1
  unsigned there;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address_of(from)), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there));
  return value;
#else
  return *from;
#endif
}

__device__ __forceinline__ void multiply(unsigned (&d)[2], unsigned a0, unsigned a1, unsigned b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%5,%5};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a0), "r"(a1), "r"(b0), "r"(0));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) IN_CLUSTERS
    products(const unsigned short* __restrict__ x, const unsigned* __restrict__ words, const void* __restrict__ vectors,
             const void* __restrict__ scales, const void* __restrict__ zeros, unsigned short* __restrict__ y) {
  SHARED_MEMORY;
  const Decoder decoder{vectors, scales, zeros};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, row = lane / 4;
  const int rank = blockIdx.x % K_BLOCKS, cluster = blockIdx.x / K_BLOCKS, clusters = gridDim.x / K_BLOCKS;
  unsigned char* ring = memory + TABLE_BYTES;
  unsigned char* shared_x = ring + SPAN * PART_BYTES * WARPS;
  float* sums = reinterpret_cast<float*>(shared_x + PHASES * SLOTS * 16);
  float* largest_of_warps = sums + TAKES * BLOCK_OUTS;

  auto chunk_of = [&](int turn) { return cluster + turn % TAKES * clusters; };
  unsigned char* my_ring = ring + warp * SPAN * PART_BYTES;
  // Starts to copy this warp's words of a turn, a phase of a chunk of outputs. Beyond either end they are zero.
  auto copy = [&](int turn) {
    const int first_row = (rank * PHASES + turn / TAKES) * WORD_ROWS_OF_PHASE;
    const int first = (chunk_of(turn) * BLOCK_OUTS + warp * OUTS) * STAGES;
    if (turn < PHASES * TAKES && chunk_of(turn) < BLOCKS_OF_OUTS)
#pragma unroll
      for (int i = 0; i < COPIES_OF_LANE; ++i) {
        const int row = EVEN ? lane / ROW_COPIES + i * 32 / ROW_COPIES : (lane + i * 32) / ROW_COPIES;
        const int word = (EVEN ? lane % ROW_COPIES + i * 32 % ROW_COPIES : (lane + i * 32) % ROW_COPIES) * COPIED;
        if (COPIES_OF_LANE * 32 != WORD_ROWS_OF_PHASE * ROW_COPIES && row >= WORD_ROWS_OF_PHASE) continue;
        const bool inside = WHOLE || (first_row + row < WORD_ROWS && first + word < OUTPUTS * STAGES);
        const unsigned* from = words + (inside ? (long long)(first_row + row) * OUTPUTS * STAGES + first + word : 0);
        const unsigned to = address_of(my_ring) + turn % SPAN * PART_BYTES + row * PITCH + word * 4;
        start_copy<COPIED>(to, from, inside);
      }
    end_group();
  };
#pragma unroll
  for (int turn = 0; turn < SPAN - 1; ++turn) copy(turn);

  // Values 2 * quad and the next of each vector whose fragment this thread holds.
  float2 held[MINE][FRAGMENTS];
  float most = 0;
#pragma unroll
  for (int i = 0; i < MINE; ++i)
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      const int place = APART ? row + f * 8 : row / 2 * 16 + 2 * f + row % 2;
      const int entry = (warp % PIECES + i * WARPS) * HELD + place, stage = min(entry / CODES, STAGES - 1);
      held[i][f] = make_float2(0, 0);
      if (2 * quad < DIM) held[i][f] = decoder.two_values(stage, entry % CODES, 2 * quad);
      most = fmaxf(most, isfinite(held[i][f].x) ? fabsf(held[i][f].x) : 0);
      most = fmaxf(most, isfinite(held[i][f].y) ? fabsf(held[i][f].y) : 0);
    }
  constexpr int EIGHTS = PHASES * SLOTS * DIM / 8, X_READS = (EIGHTS + THREADS - 1) / THREADS;
  uint4 my_x[X_READS];
#pragma unroll
  for (int i = 0; i < X_READS; ++i) {
    const int eight = threadIdx.x + i * THREADS;
    my_x[i] = eight < EIGHTS ? eight_inputs<EXACT>(x, 0, (rank * EIGHTS + eight) * 8) : make_uint4(0, 0, 0, 0);
  }
  most = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(most)));
  const float most_x = largest(my_x);
  if (lane == 0) largest_of_warps[warp] = most, largest_of_warps[WARPS + warp] = most_x;
  __syncthreads();
  float most_of_x = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    most = fmaxf(most, largest_of_warps[i]);
    most_of_x = fmaxf(most_of_x, largest_of_warps[WARPS + i]);
  }
  const float2 power = power_for(most, 6), x_power = power_for(most_of_x, 3);
  const float unit = power.y * x_power.y;
  unsigned fragments[MINE][FRAGMENTS];
#pragma unroll
  for (int i = 0; i < MINE; ++i)
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f)
      fragments[i][f] = two_halves<false>(held[i][f].x * power.x, held[i][f].y * power.x);
  // The inputs of a code take 16 bytes, and lie in the order of the tiles they are multiplied in.
#pragma unroll
  for (int i = 0; i < X_READS; ++i) {
    const int eight = threadIdx.x + i * THREADS;
    if (eight >= EIGHTS) continue;
    const uint4 all_halves = halves_of(my_x[i], x_power.x);
    const unsigned* half = reinterpret_cast<const unsigned*>(&all_halves);
#pragma unroll
    for (int j = 0; j < 8 / DIM; ++j) {
      const int slot = eight * (8 / DIM) + j, phase = slot / SLOTS, mine = slot % SLOTS;
      const int u = mine / UNIT_CODES, code = mine % UNIT_CODES;
      const int place = APART ? (code / 2 * 8 + u % 8) * 8 + u / 8 * 2 + code % 2 : mine;
      uint4 all = make_uint4(half[j * (DIM / 2)], 0, 0, 0);
      if constexpr (DIM >= 4) all.y = half[j * (DIM / 2) + 1];
      if constexpr (DIM == 8) all.z = half[2], all.w = half[3];
      *reinterpret_cast<uint4*>(shared_x + (phase * SLOTS + place) * 16) = all;
    }
  }
  for (int i = threadIdx.x; i < TAKES * BLOCK_OUTS; i += THREADS) sums[i] = 0;
  __syncthreads();

  // Eight words that lie together, as two halves. Threads of odd rows begin with the other one, so that the threads
  // that write at a time do not meet in a bank.
  auto write = [&](unsigned char* to, const unsigned (&w)[8]) {
    const bool odd = row % 2;
    const uint4 low = make_uint4(w[0], w[1], w[2], w[3]), high = make_uint4(w[4], w[5], w[6], w[7]);
    const uint4 first = odd ? high : low, second = odd ? low : high;
    *reinterpret_cast<uint4*>(to + odd * 16) = first;
    *reinterpret_cast<uint4*>(to + 16 - odd * 16) = second;
  };
  auto build = [&](int phase) {
    const unsigned char* phase_x = shared_x + phase * SLOTS * 16;
    const int inside = LENGTH - (rank * PHASES + phase) * SLOTS;  // slots that there are
    constexpr int STEPS = APART ? UNIT_CODES / 2 : SLOTS / 16;
#pragma unroll 1
    for (int step = warp / PIECES < SHARING ? warp / PIECES : STEPS; step < STEPS; step += SHARING) {
      unsigned inputs[APART ? 8 : 2];
#pragma unroll
      for (int t = 0; t < (APART ? 8 : 2); ++t)
        inputs[t] =
            *reinterpret_cast<const unsigned*>(phase_x + ((step * (APART ? 8 : 2) + t) * 8 + row) * 16 + quad * 4);
#pragma unroll
      for (int i = 0; i < MINE; ++i) {
        const int first = (warp % PIECES + i * WARPS) * HELD;
        if (PIECES > WARPS && PIECES % WARPS != 0 && first >= STAGES * CODES) continue;
        unsigned upper[8], lower[8];
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          unsigned d[2];
          if constexpr (APART) multiply(d, fragments[i][0], fragments[i][1], inputs[t]);
          else multiply(d, inputs[0], inputs[1], fragments[i][t]);
          // A slot beyond the input side adds nothing, even if a vector is infinite.
          if constexpr (!EXACT && APART) {
            const int slot = (quad * 8 + t) * UNIT_CODES + step * 2;
            const unsigned mask = slot + 1 < inside ? ~0u : slot < inside ? 0xffff : 0;
            d[0] &= mask, d[1] &= mask;
          } else if constexpr (!EXACT) {
            if (step * 16 + row >= inside) d[0] = 0;
            if (step * 16 + row + 8 >= inside) d[1] = 0;
          }
          upper[t] = d[0], lower[t] = d[1];
        }
        unsigned char* to = memory + first / CODES * STAGE_BYTES + quad * 32;
        if constexpr (APART) to += (first % CODES + row) * ROW_BYTES + step * 128;
        else to += (step * 16 + row) * ROW_BYTES + first % CODES * 2;
        write(to, upper), write(to + 8 * ROW_BYTES, lower);
      }
    }
  };
  const int my_unit = lane / LANES, my_out = lane % LANES * COLUMNS;  // of the warp's outputs
  const unsigned base = APART ? lane * 4 : my_unit * UNIT_CODES * ROW_BYTES;
  auto use = [&](int turn) {
    const unsigned char* from = my_ring + turn % SPAN * PART_BYTES + my_unit * UNIT_WORDS * PITCH + my_out * STAGES * 4;
    unsigned codes[UNIT_WORDS][LANE_WORDS];
#pragma unroll
    for (int i = 0; i < UNIT_WORDS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_WORDS; j += LANE_WORDS % 4 == 0 ? 4 : 1) {
        if constexpr (LANE_WORDS % 4 == 0) {
          const uint4 four = *reinterpret_cast<const uint4*>(from + i * PITCH + j * 4);
          codes[i][j] = four.x, codes[i][j + 1] = four.y, codes[i][j + 2] = four.z, codes[i][j + 3] = four.w;
        } else {
          codes[i][j] = *reinterpret_cast<const unsigned*>(from + i * PITCH + j * 4);
        }
      }
    float totals[COLUMNS] = {};
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
      unsigned short chain = 0;
#pragma unroll
      for (int n = 0; n < UNIT_CODES * STAGES; ++n) {
        const int stage = n % STAGES, code = n / STAGES, word = column * STAGES + stage;
        unsigned offset;
        if constexpr (BITS == 8 && SHIFT == 8)
          offset = __byte_perm(codes[code / 4][word], base, 0x7704 | code % 4 << 4);
        else offset = field_or<BITS>(codes, word, code * BITS, SHIFT, base);
        const unsigned short number =
            *reinterpret_cast<const unsigned short*>(memory + stage * STAGE_BYTES + step_of(code) + offset);
        if (n % CHAIN == 0) chain = number;
        else asm("add.rn.f16 %0, %0, %1;" : "+h"(chain) : "h"(number));
        if (n % CHAIN == CHAIN - 1 || n == UNIT_CODES * STAGES - 1) {
          totals[column] += float_of(chain);
        }
      }
    }
    // Lanes of different units add up, and share out the columns while there are several.
    int have = COLUMNS, mine = 0;
#pragma unroll
    for (int far = LANES; far < 32; far *= 2) {
      const bool up = lane & far;
      if (have > 1) {
        have /= 2, mine += up ? have : 0;
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i)
          if (i < have) {
            const float kept = up ? totals[i + have] : totals[i], sent = up ? totals[i] : totals[i + have];
            totals[i] = kept + __shfl_xor_sync(~0u, sent, far);
          }
      } else {
        totals[0] += __shfl_xor_sync(~0u, totals[0], far);
      }
    }
    if (my_unit < COLUMNS) {
      float* to = sums + turn % TAKES * BLOCK_OUTS + warp * OUTS + my_out + mine;
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i)
        if (i < have) to[i] = totals[i] * unit + (PHASES == 1 ? 0 : to[i]);
    }
  };

#pragma unroll 1
  for (int phase = 0; phase < PHASES; ++phase) {
    if (phase > 0) __syncthreads();
    build(phase);
    __syncthreads();
#pragma unroll 1
    for (int take = 0; take < TAKES; ++take) {
      const int turn = phase * TAKES + take;
      copy(turn + SPAN - 1);
      wait_for_all_but<SPAN - 1>();
      __syncwarp();
      if (chunk_of(turn) < BLOCKS_OF_OUTS) use(turn);
      __syncwarp();
    }
  }
  meet();
  for (int i = rank * THREADS + threadIdx.x; i < TAKES * BLOCK_OUTS; i += K_BLOCKS * THREADS) {
    float sum = 0;
#pragma unroll
    for (int block = 0; block < K_BLOCKS; ++block) sum += read_of_block(sums + i, block);
    const int out = chunk_of(i / BLOCK_OUTS) * BLOCK_OUTS + i % BLOCK_OUTS;
    if (out < OUTPUTS) y[out] = rounded(sum);
  }
  meet();
}
