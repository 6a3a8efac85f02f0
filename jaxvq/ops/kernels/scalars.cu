// x @ w for a row or two of x and codes of single values, by the integer matrix units.
//
// Every value is split into digits of 7 bits, whose products and sums are exact. A palette's entry is
// least + step * (128 * high + low), two digits; so 16 entries are 8 registers, in which a byte permutation looks up
// four codes at once. It reads three bits of each code and, where the fourth is set, copies the sign of the digit: 0.
// So the entries from 8 on are looked up by the codes with the fourth bit turned over, and the two products added.
// A value of x is three digits, in columns of their own. A row of ones gives the sum of x, which `least` multiplies.
// Evenly spaced levels need no table: code and zero point take the places of the digits and of `least`.
//
// A lane of a warp belongs to quad lane % 4 and row lane / 4. It holds COLUMNS neighbouring outputs. The four quads
// take turns along the input side: each reads whole units, the fewest words that end where eight codes end. The K_WARPS
// of a block share the input side; each scales x by the largest value in its own part. They add up in a fixed order.
//
// Compiled with: ROWS of x (1 or 2), INPUTS, OUTPUTS, LENGTH (codes along the input side), BITS, BFLOAT (16-bit type of
// x); AFFINE; ENTRIES, G_BLOCKS, OUT_BLOCKS of the palettes or zero points; VECTORS, SCALES, ZEROS (types, 0 for none);
// SCALE_G, SCALE_OUT (blocks of scales); COLUMNS, K_WARPS, SPAN (turns on their way), BLOCKS (at once on a processor).

#include "codes.cuh"

constexpr int OCTETS = UNIT_CODES / 8;
static_assert(OUT_WARPS == 1, "all warps of a block share its outputs");
// The input side is dealt out in whole groups, or else in as many turns of the four quads as are on their way.
constexpr int TURNS = (UNITS + 3) / 4, PART_TURNS = GROUPED ? GROUP_CODES / UNIT_CODES / 4 : SPAN;
constexpr int PARTS = (TURNS + PART_TURNS - 1) / PART_TURNS, PARTS_MOST = (PARTS + K_WARPS - 1) / K_WARPS;
constexpr int TURN_CODES = 4 * UNIT_CODES, MY_TURNS = PARTS_MOST * PART_TURNS, MY_CODES = MY_TURNS * TURN_CODES;
constexpr int X_STRIDE = MY_CODES + 32;          // bytes; the digits of x then lie in different banks
constexpr int X_READS = (MY_CODES + 255) / 256;  // of eight values by each lane
constexpr bool EXACT = LENGTH == INPUTS && UNITS * UNIT_CODES == LENGTH && UNITS % (4 * PART_TURNS * K_WARPS) == 0;
constexpr bool WIDE = !AFFINE && BITS == 4;                                       // more than eight entries
constexpr int DIGITS = AFFINE ? 1 : 2, TABLE_ROW = 48, TABLE = OUTS * TABLE_ROW;  // bytes: 2 x 16 digits, step, least
constexpr long long NEXT_PART = ((K_WARPS - 1) * PART_TURNS + SPAN) * NEXT_TURN;  // words to a warp's next part
static_assert(PART_TURNS % SPAN == 0, "a group must end where a span ends");
constexpr int RAW = (OUTS * 8 + THREADS - 1) / THREADS;

__device__ __forceinline__ void multiply(int (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, uint2 b) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ uint2 codes_as_bytes(const unsigned (&words)[UNIT_WORDS], int octet) {
  if constexpr (BITS == 8) return make_uint2(words[octet * 2], words[octet * 2 + 1]);
  if constexpr (BITS <= 4) {
    const unsigned t = nibbles(words, octet), even = t & 0x0f0f0f0f, odd = t >> 4 & 0x0f0f0f0f;
    return make_uint2(permuted(even, odd, 0x5140), permuted(even, odd, 0x7362));
  }
  unsigned bytes[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = octet * 8 * BITS + half * 4 * BITS, i = at / 32, begin = at % 32;
    const unsigned t = begin + 4 * BITS > 32 ? __funnelshift_r(words[i], words[i + 1], begin) : words[i] >> begin;
    constexpr unsigned MASK = (1u << BITS) - 1;
    bytes[half] = (t & MASK) | (t << (8 - BITS) & MASK << 8) | (t << 2 * (8 - BITS) & MASK << 16) |
                  (t << 3 * (8 - BITS) & MASK << 24);
  }
  return make_uint2(bytes[0], bytes[1]);
}

// Two entries of a palette, its scale, and the zero point of evenly spaced levels.
struct Raw {
  float a, b, scale, zero;
};

// Eight threads do the palette of one output.
__device__ __forceinline__ Raw read_entries(const Decoder& decoder, int group, int first_out, int i) {
  const int out = first_out + i / 8, part = i % 8;
  Raw raw = {0, 0, decoder.scale(group, out), 0};
  if constexpr (AFFINE) raw.zero = decoder.zero(group, out);
  else raw.a = decoder.entry(group, out, 0, 2 * part, 0), raw.b = decoder.entry(group, out, 0, 2 * part + 1, 0);
  return raw;
}

// NaN if one of them is.
__device__ __forceinline__ float smaller(float a, float b) {
  float x;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}

__device__ __forceinline__ void write_entries(unsigned char* table, const Raw& raw, int i) {
  const int part = i % 8;
  unsigned char* row = table + i / 8 * TABLE_ROW;
  float2 levels = make_float2(raw.scale, -raw.scale * raw.zero);
  if constexpr (!AFFINE) {
    float least = smaller(raw.a, raw.b), most = -smaller(-raw.a, -raw.b);
#pragma unroll
    for (int far = 1; far < 8; far *= 2) {
      least = smaller(least, __shfl_xor_sync(~0u, least, far));
      most = -smaller(-most, -__shfl_xor_sync(~0u, most, far));
    }
    const float step = (most - least) * (1.f / 16383), inverse = step > 0 ? fminf(__fdividef(1, step), 3e38f) : 0;
    const int p = min(__float2int_rn((raw.a - least) * inverse), 16383);
    const int q = min(__float2int_rn((raw.b - least) * inverse), 16383);
    *reinterpret_cast<unsigned short*>(row + 2 * part) = (unsigned short)((p & 127) | (q & 127) << 8);
    *reinterpret_cast<unsigned short*>(row + 16 + 2 * part) = (unsigned short)(p >> 7 | q >> 7 << 8);
    levels = make_float2(step * raw.scale, least * raw.scale);
  }
  if (part == 0) *reinterpret_cast<float2*>(row + 32) = levels;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    scalars(const unsigned short* __restrict__ x, const unsigned* __restrict__ words, const void* __restrict__ vectors,
            const void* __restrict__ scales, const void* __restrict__ zeros, unsigned short* __restrict__ y) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Decoder decoder{vectors, scales, zeros};
  const int lane = threadIdx.x % 32, quad = lane % 4, row = lane / 4, warp = threadIdx.x / 32;
  // Tables of this block of outputs and the next, or one for each warp; sums of the warps, twice; digits of x.
  constexpr int TABLES = (GROUPED ? K_WARPS : 2) * TABLE, SUMS = K_WARPS * ROWS * OUTS;
  float* shared_sums = reinterpret_cast<float*>(memory + TABLES);
  unsigned char* digits = memory + TABLES + 2 * 4 * SUMS + warp * 3 * ROWS * X_STRIDE;

  // Beyond the outputs and the input side any code may be read: there x counts as zero and nobody asks for the sum.
  auto turn_of = [&](int mine) { return (mine / PART_TURNS * K_WARPS + warp) * PART_TURNS + mine % PART_TURNS; };
  unsigned codes[SPAN][UNIT_WORDS][COLUMNS];
  auto start_of = [&](int block) { return unit_at(words, turn_of(0) * 4 + quad, block * OUTS + row * COLUMNS); };
  const unsigned* from = start_of(blockIdx.x);
  auto read = [&](int s, int mine, int block) {
    read_unit<EXACT>(codes[s], from + s * NEXT_TURN, EXACT ? 0 : turn_of(mine + s) * 4 + quad,
                     block * OUTS + row * COLUMNS);
  };
#pragma unroll
  for (int s = 0; s < SPAN; ++s) read(s, 0, blockIdx.x);

  // The part of x that this warp multiplies, as digits from -64 to 64, the first to 127: up to 2,080,767 units.
  auto read_x = [&](int n, int i) {
    const int mine = i * 256 + lane * 8, at = turn_of(mine / TURN_CODES) * TURN_CODES + mine % TURN_CODES;
    uint4 all = make_uint4(0, 0, 0, 0);
    if constexpr (INPUTS % 8 == 0) {
      if (mine < MY_CODES && (EXACT || at < INPUTS)) all = __ldg(reinterpret_cast<const uint4*>(x + n * INPUTS + at));
    } else if (mine < MY_CODES) {
      unsigned* to = reinterpret_cast<unsigned*>(&all);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (at + j < INPUTS) to[j / 2] |= (unsigned)__ldg(x + n * INPUTS + at + j) << j % 2 * 16;
    }
    return all;
  };
  uint4 my_x[ROWS][X_READS];
#pragma unroll
  for (int n = 0; n < ROWS; ++n)
#pragma unroll
    for (int i = 0; i < X_READS; ++i) my_x[n][i] = read_x(n, i);
  Raw raw[RAW];
  auto read_tables = [&](int block) {
#pragma unroll
    for (int i = 0; i < RAW; ++i) {
      const int item = threadIdx.x + i * THREADS;
      if (item < OUTS * 8) raw[i] = read_entries(decoder, 0, block * OUTS, item);
    }
  };
  auto write_tables = [&](unsigned char* table) {
#pragma unroll
    for (int i = 0; i < RAW; ++i) {
      const int item = threadIdx.x + i * THREADS;
      if (item < OUTS * 8) write_entries(table, raw[i], item);
    }
  };
  if constexpr (!GROUPED) read_tables(blockIdx.x);

  float unit_of_x[ROWS];
  int sum_of_x[ROWS][3] = {};
#pragma unroll
  for (int n = 0; n < ROWS; ++n) {
    unsigned most = 0;  // the bits of a float without its sign compare like the float
#pragma unroll
    for (int i = 0; i < X_READS; ++i) {
      const unsigned* two = reinterpret_cast<const unsigned*>(&my_x[n][i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) most = max(most, max(two[j] & 0x7fff, two[j] >> 16 & 0x7fff));
    }
    most = __reduce_max_sync(~0u, most);
    const float size = x_value((unsigned short)most);
    const float inverse = size > 0 ? fminf(2080000.f / size, 3e38f) : 0;
    unit_of_x[n] = size > 0 ? 1 / inverse : size * 0;  // NaN for NaN
#pragma unroll
    for (int i = 0; i < X_READS; ++i) {
      const unsigned* two = reinterpret_cast<const unsigned*>(&my_x[n][i]);
      unsigned bytes[3][2] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int whole = __float2int_rn(x_value((unsigned short)(two[j / 2] >> (j % 2 * 16))) * inverse);
        const int upper = (whole + 64) >> 7, first = (upper + 64) >> 7;
        const int parts[3] = {first, upper - (first << 7), whole - (upper << 7)};
#pragma unroll
        for (int p = 0; p < 3; ++p) {
          bytes[p][j / 4] |= (unsigned)(parts[p] & 255) << (j % 4 * 8);
          sum_of_x[n][p] += parts[p];
        }
      }
#pragma unroll
      for (int p = 0; p < 3; ++p)
        if (i * 256 + lane * 8 < MY_CODES)
          *reinterpret_cast<uint2*>(digits + (n * 3 + p) * X_STRIDE + i * 256 + lane * 8) =
              make_uint2(bytes[p][0], bytes[p][1]);
    }
  }
  // This lane's columns of a product are digits 2 * quad % 4 and the next of row quad / 2 of x.
  const int my_row = min(quad / 2, ROWS - 1);
  float ones[2] = {};
  if constexpr (!GROUPED) {
    int sums[ROWS][3];
#pragma unroll
    for (int n = 0; n < ROWS; ++n)
#pragma unroll
      for (int p = 0; p < 3; ++p) sums[n][p] = __reduce_add_sync(~0u, sum_of_x[n][p]);
    const int n = ROWS - 1;
    ones[0] = quad % 2 == 0 ? (my_row == n ? sums[n][0] : sums[0][0]) : (my_row == n ? sums[n][2] : sums[0][2]);
    ones[1] = quad % 2 == 0 ? (my_row == n ? sums[n][1] : sums[0][1]) : 0;
    write_tables(memory);
    __syncthreads();
  } else {
    __syncwarp();
  }

  constexpr int TILES = (COLUMNS + 1) / 2;
  unsigned entries[COLUMNS][DIGITS][WIDE ? 4 : 2];
  float totals[TILES][4];
  int sums[DIGITS][TILES][4], sums_of_x[4];
  auto start = [&](const unsigned char* table) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums_of_x[i] = 0;
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int d = 0; d < DIGITS; ++d) sums[d][t][i] = 0;
    }
    if constexpr (!AFFINE)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int d = 0; d < 2; ++d) {
          const uint4 all = *reinterpret_cast<const uint4*>(table + (row * COLUMNS + c) * TABLE_ROW + d * 16);
          entries[c][d][0] = all.x, entries[c][d][1] = all.y;
          if constexpr (WIDE) entries[c][d][2] = all.z, entries[c][d][3] = all.w;
        }
  };
  auto add_up = [&](const unsigned char* table) {  // what the digits stand for
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 2 * t + i / 2;
        if (c < COLUMNS) {
          const float2 levels = *reinterpret_cast<const float2*>(table + (row * COLUMNS + c) * TABLE_ROW + 32);
          float sum = sums[0][t][i];
          if constexpr (!AFFINE) sum += 128.f * sums[DIGITS - 1][t][i];
          totals[t][i] += levels.x * sum + levels.y * (GROUPED ? (float)sums_of_x[i % 2] : ones[i % 2]);
        }
      }
  };
  const unsigned char* my_digits =
      digits + (min(row / 4, ROWS - 1) * 3 + min(row % 4, 2)) * X_STRIDE + quad * UNIT_CODES;

  auto use = [&](const unsigned char* my_x, const unsigned (&from)[UNIT_WORDS][COLUMNS]) {
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet) {
      const uint2 b = *reinterpret_cast<const uint2*>(my_x + octet * 8);
      if constexpr (GROUPED) multiply(sums_of_x, 0x01010101, 0x01010101, 0x01010101, 0x01010101, b);
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        unsigned a[2][DIGITS][WIDE ? 2 : 1][2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int c = 2 * t + i;
          if (c < COLUMNS) {
            unsigned mine_of[UNIT_WORDS];
#pragma unroll
            for (int j = 0; j < UNIT_WORDS; ++j) mine_of[j] = from[j][c];
            if constexpr (AFFINE) {
              const uint2 both = codes_as_bytes(mine_of, octet);
              a[i][0][0][0] = both.x, a[i][0][0][1] = both.y;
            } else {
              const unsigned lower = nibbles(mine_of, octet), upper = lower ^ 0x88888888;
#pragma unroll
              for (int d = 0; d < 2; ++d) {
                a[i][d][0][0] = permuted(entries[c][d][0], entries[c][d][1], lower);
                a[i][d][0][1] = permuted(entries[c][d][0], entries[c][d][1], lower >> 16);
                if constexpr (WIDE) {
                  a[i][d][1][0] = permuted(entries[c][d][2], entries[c][d][3], upper);
                  a[i][d][1][1] = permuted(entries[c][d][2], entries[c][d][3], upper >> 16);
                }
              }
            }
          }
        }
#pragma unroll
        for (int d = 0; d < DIGITS; ++d)
#pragma unroll
          for (int h = 0; h < (WIDE ? 2 : 1); ++h)
            multiply(sums[d][t], a[0][d][h][0], a[1][d][h][0], a[0][d][h][1], a[1][d][h][1], b);
      }
    }
  };

  for (int block = blockIdx.x, i = 0; block < BLOCKS_OF_OUTS; block += gridDim.x, ++i) {
    const int next = block + gridDim.x;
    const bool more = next < BLOCKS_OF_OUTS;
    unsigned char* table = memory + (GROUPED ? warp : i % 2) * TABLE;
    if constexpr (!GROUPED) {
      start(table);
      if (more) read_tables(next);
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j) totals[t][j] = 0;
#pragma unroll 1
    for (int turn = 0; turn < MY_TURNS; turn += SPAN) {
      if constexpr (GROUPED)
        if (turn % PART_TURNS == 0) {
          if (turn > 0) add_up(table);
          __syncwarp();
          const int group = min(turn / PART_TURNS * K_WARPS + warp, FINEST - 1);
#pragma unroll 1
          for (int item = lane; item < OUTS * 8; item += 32)
            write_entries(table, read_entries(decoder, group, block * OUTS, item), item);
          __syncwarp();
          start(table);
        }
      const bool last = turn + SPAN == MY_TURNS;
      from = last ? start_of(next) : from + ((turn + SPAN) % PART_TURNS == 0 ? NEXT_PART : SPAN * NEXT_TURN);
#pragma unroll
      for (int s = 0; s < SPAN; ++s) {
        use(my_digits + (turn + s) * TURN_CODES, codes[s]);
        if (!last || more) read(s, last ? 0 : turn + SPAN, last ? next : block);
      }
    }
    add_up(table);
    float* sums_here = shared_sums + i % 2 * SUMS;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float sum = quad % 2 == 0 ? 16384.f * totals[t][2 * j] + 128.f * totals[t][2 * j + 1] : totals[t][2 * j];
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (quad % 2 == 0 && quad / 2 < ROWS && 2 * t + j < COLUMNS)
          sums_here[(warp * ROWS + my_row) * OUTS + row * COLUMNS + 2 * t + j] =
              sum * (my_row == 0 ? unit_of_x[0] : unit_of_x[ROWS - 1]);
      }
    if constexpr (!GROUPED)
      if (more) write_tables(memory + (i + 1) % 2 * TABLE);
    __syncthreads();
    write_products(y, sums_here, block * OUTS);
  }
}
