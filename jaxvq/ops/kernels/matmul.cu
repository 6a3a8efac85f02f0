// x @ w with the codes of w read straight from memory, by the matrix units; or, with EXPAND, w itself, transposed.
//
// A lane of a warp belongs to quad lane % 4 and row lane / 4. It holds COLUMNS neighbouring outputs. The four quads
// take turns along the input side, each reading whole units. The eight values decoded at a time become four registers,
// which are a lane's share of the first factor of a product of tiles (w, transposed); the second factor is x. For a
// product a weight goes from memory to a register and never comes by shared memory.
//
// How the four registers (pairs of values p0 to p3 of one output) make up a product depends on the rows of x. At most
// four (SPLIT) wait in shared memory, and the registers are used as they come: p0 and p2 as row r of the tile, p1 and
// p3 as row r + 8, against two columns for each row of x, which hold what p0, p2 and what p1, p3 are to be
// multiplied by. With many, rows r and r + 8 are two outputs, and a row of x takes one column.
//
// Palettes of 16 values are looked up in eight registers, a byte at a time. Vectors are looked up in shared memory, in
// as many COPIES as let lanes read without waiting for each other, or in global memory (no copies). Evenly spaced
// levels without groups are multiples of a power of two from -1 to 1 in there, which 16-bit floats hold exactly;
// products with ones are the sums of x, and the scale and zero point of an output follow at the end.
//
// The K_WARPS of a block share the input side and add up at the end, in a fixed order. With EXPAND nothing is added up:
// K_BLOCKS share the input side. The weight is written output by output, for eight values of one output are decoded
// together and become one store, and XLA multiplies such a weight faster. Where a unit is longer, what the lanes have
// decoded waits in shared memory, so that each store of a warp fills whole lines.
//
// Compiled with: ROWS of x, INPUTS, OUTPUTS, LENGTH (codes along the input side), BITS, STAGES, DIM, BFLOAT (16-bit
// type of x); AFFINE; ENTRIES, G_BLOCKS, OUT_BLOCKS of the codebook or zero points; VECTORS, SCALES, ZEROS (types, 0
// for none); SCALE_G, SCALE_OUT, SCALE_STAGES (blocks of scales); COPIES, COLUMNS, K_WARPS, OUT_WARPS, SPAN (turns on
// their way), BLOCKS (at once on a processor), SPLIT, HALVED (the last of the OUT_WARPS has half as many outputs),
// EXPAND; K_BLOCKS, which is 1 without it. LANES are 8.

#include "codes.cuh"

static_assert(LANES == 8 && (EXPAND || K_BLOCKS == 1), "a product of tiles has 8 rows, and a block adds up");
static_assert(!EXPAND || OUT_WARPS == 1, "what waits has room for the warps that share the input side");
static_assert(COLUMNS % 2 == 0 && (!HALVED || (COLUMNS == 4 && !EXPAND)), "sums are written two at a time");
constexpr bool PALETTE = !AFFINE && DIM == 1, TABLE = DIM > 1 && COPIES > 0, WIDE = BITS == 4;
constexpr bool CENTERED = AFFINE && !GROUPED && !EXPAND;
constexpr int MIDDLE = 1 << (BITS - 1);          // the code that becomes zero; code zero becomes -1
constexpr bool CROSSED = CENTERED && BITS == 4;  // pairs of values are 0 and 4, 1 and 5, 2 and 6, 3 and 7
constexpr int TURNS = (UNITS + SHARES * SPAN - 1) / (SHARES * SPAN) * SPAN;
constexpr bool EXACT = LENGTH * DIM == INPUTS && UNITS * UNIT_VALUES == INPUTS && UNITS % (SHARES * SPAN) == 0;
constexpr int SUMS_ROW = BLOCK_OUTS + 4;  // the quads then write to other banks
constexpr int TILES_N = SPLIT ? 1 : (ROWS + 7) / 8, TILES_M = SPLIT ? COLUMNS : COLUMNS / 2;
__device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
constexpr int LANES_APART = COPIES > 0 ? COPIES : 1;  // lanes that read copies of their own
constexpr int CELL = DIM * 2,
              STRIDE = power_of_two(STAGES) * COPIES * CELL;  // bytes from an entry of the table to the next
constexpr int TABLE_BYTES = TABLE ? (1 << BITS) * STRIDE : PALETTE ? (GROUPED ? K_WARPS : 1) * BLOCK_OUTS * 32 : 0;
constexpr int X_BYTES = SPLIT && !EXPAND ? ROWS * TURNS * SHARES * UNIT_VALUES * 2 : 0;
constexpr int PIECE = !EXPAND ? 1 : UNIT_VALUES < 64 ? UNIT_VALUES / 8 : 8;  // eights of a unit written out together
constexpr int WAITING_BYTES = PIECE > 1 ? K_WARPS * 512 * PIECE : 0;

__device__ __forceinline__ void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
  if constexpr (BFLOAT)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two codes, which are the last bits of 16-bit floats of 128 or 1024, less MIDDLE and divided by it.
__device__ __forceinline__ unsigned centered(unsigned both) {
  unsigned result;
  if constexpr (BFLOAT) {
    constexpr unsigned INVERSE = 0x3f80 - ((BITS - 1) << 7), LESS = 0xc300 + MIDDLE - ((BITS - 1) << 7);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(both), "r"(INVERSE * 0x10001), "r"(LESS * 0x10001));
  } else {
    constexpr unsigned INVERSE = 0x3c00 - ((BITS - 1) << 10), LESS = 0xe400 + MIDDLE - ((BITS - 1) << 10);
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(both), "r"(INVERSE * 0x10001), "r"(LESS * 0x10001));
  }
  return result;
}

// The upper half of `a`, whose nibbles are below 8. The unit that shifts has all the rest to do, so it is moved by an
// addition of 16-bit floats: with such nibbles it is a number, which adding nothing leaves as it is.
__device__ __forceinline__ unsigned upper_half(unsigned a) {
  unsigned result;
  asm("{.reg .b16 low, high; .reg .b32 twice; mov.b32 {low, high}, %1; mov.b32 twice, {high, high};"
      "add.rn.f16x2 %0, twice, %2;}"
      : "=r"(result)
      : "r"(a), "r"(0));
  return result;
}

__device__ __forceinline__ uint4 crossed(uint4 x) {
  if constexpr (!CROSSED) return x;
  return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
                    __byte_perm(x.y, x.w, 0x7632));
}

// Shares out COUNT items among so many threads, some items at a time: what they read is then on its way together.
template <int COUNT, int AMONG = THREADS, typename Item>
__device__ __forceinline__ void share_out(int thread, Item item) {
#pragma unroll 4
  for (int n = 0; n < (COUNT + AMONG - 1) / AMONG; ++n) {
    const int i = n * AMONG + thread;
    if (COUNT % AMONG == 0 || i < COUNT) item(i);
  }
}

// Writes the palettes of COUNT outputs, shared out among so many threads: for each output the lower bytes of eight or
// sixteen 16-bit floats, then, 16 bytes further, the upper ones.
template <int COUNT, int AMONG>
__device__ __forceinline__ void write_palettes(unsigned char* palettes, const Decoder& decoder, int group,
                                               int first_out, int thread) {
  constexpr int EIGHTS = WIDE ? 2 : 1, READ = BITS < 3 ? 1 << BITS : 8;
  share_out<COUNT * EIGHTS, AMONG>(thread, [&](int i) {
    const int out = first_out + i / EIGHTS, eight = i % EIGHTS;
    const Entries<READ> entries = decoder.entries<READ>(group, out, eight * 8);
    const float scale = decoder.scale(group, out);
    unsigned two[4] = {};
#pragma unroll
    for (int j = 0; j < READ / 2; ++j)
      two[j] = two_halves<BFLOAT>(number_of<VECTORS>(entries.bits[2 * j]) * scale,
                                  number_of<VECTORS>(entries.bits[2 * j + 1]) * scale);
    uint2* to = reinterpret_cast<uint2*>(palettes + i / EIGHTS * 32) + eight;
    to[0] = make_uint2(__byte_perm(two[0], two[1], 0x6420), __byte_perm(two[2], two[3], 0x6420));
    to[2] = make_uint2(__byte_perm(two[0], two[1], 0x7531), __byte_perm(two[2], two[3], 0x7531));
  });
}

// Codes beyond the entries, as those read beyond the input side may be, stand for the last entry. Each thread writes
// all copies of an entry, beginning with that of its own lane, so that they do not meet in a bank. A table that is the
// codebook as it is comes by copies, which end with `wait_for_all_but<0>`.
__device__ __forceinline__ void write_table(unsigned char* table, const Decoder& decoder) {
  share_out<(1 << BITS) * STAGES>(threadIdx.x, [&](int i) {
    const int stage = i % STAGES, code = i / STAGES;
    unsigned cell[(DIM + 1) / 2];
    if constexpr (SCALES == 0 && VECTORS == (BFLOAT ? BFLOAT16 : FLOAT16)) {
      const unsigned* from =
          static_cast<const unsigned*>(decoder.vectors) + (stage * ENTRIES + min(code, ENTRIES - 1)) * (DIM / 2);
      if constexpr (DIM == 8 && COPIES == 1) {
        start_copy<4>(address_of(table + code * STRIDE + stage * CELL), from);
        return;
      } else if constexpr (DIM == 8) {
        const uint4 all = __ldg(reinterpret_cast<const uint4*>(from));
        cell[0] = all.x, cell[1] = all.y, cell[2] = all.z, cell[3] = all.w;
      } else {
#pragma unroll
        for (int j = 0; j < DIM / 2; ++j) cell[j] = __ldg(from + j);
      }
    } else {
      const float scale = decoder.scale(0, 0, stage);
#pragma unroll
      for (int j = 0; j < DIM / 2; ++j)
        cell[j] = two_halves<BFLOAT>(decoder.entry(0, 0, stage, code, 2 * j) * scale,
                                     decoder.entry(0, 0, stage, code, 2 * j + 1) * scale);
    }
#pragma unroll
    for (int copy = 0; copy < COPIES; ++copy) {
      unsigned char* to = table + code * STRIDE + (stage * COPIES + (copy + threadIdx.x) % LANES_APART) * CELL;
      if constexpr (DIM == 8) *reinterpret_cast<uint4*>(to) = make_uint4(cell[0], cell[1], cell[2], cell[3]);
      else if constexpr (DIM == 4) *reinterpret_cast<uint2*>(to) = make_uint2(cell[0], cell[1]);
      else *reinterpret_cast<unsigned*>(to) = cell[0];
    }
  });
  end_group();
}

// Columns of a warp, known to the compiler.
template <int N>
struct Columns {
  static constexpr int COUNT = N;
};
constexpr int HALF = COLUMNS / 2;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    matmul(const unsigned short* __restrict__ x, const unsigned* __restrict__ words, const void* __restrict__ vectors,
           const void* __restrict__ scales, const void* __restrict__ zeros, unsigned short* __restrict__ y) {
  SHARED_MEMORY;
  const Decoder decoder{vectors, scales, zeros};
  const int lane = threadIdx.x % 32, quad = lane % SHARES, row = lane / SHARES;
  const int warp = threadIdx.x / 32, k_warp = warp % K_WARPS, out_warp = OUT_WARPS == 1 ? 0 : warp / K_WARPS;
  // Blocks that run at the same time write neighbouring inputs of the same outputs.
  const int blocks = gridDim.x / K_BLOCKS, first_block = blockIdx.x / K_BLOCKS;
  const int sharer = blockIdx.x % K_BLOCKS * K_WARPS + k_warp;
  unsigned char* palettes = memory + (GROUPED ? warp : out_warp) * OUTS * 32;
  unsigned char* shared_x = memory + TABLE_BYTES;
  float* shared_sums = reinterpret_cast<float*>(shared_x + X_BYTES);

  float sums[TILES_M][TILES_N][4], sums_of_x[TILES_N][4];
  unsigned codes[SPAN][UNIT_WORDS][LANE_WORDS] = {};
  unsigned entries[COLUMNS][4 * WIDE + 4];
  int first_out = 0;
  const bool half = HALVED && out_warp == OUT_WARPS - 1;
  const int columns = half ? HALF : COLUMNS;
  auto with_columns = [&](auto go) {
    if (half) go(Columns<HALF>());
    else go(Columns<COLUMNS>());
  };

  constexpr int X_ROW = TURNS * SHARES * UNIT_VALUES;
  const unsigned char* my_x = shared_x + min(row / 2, ROWS - 1) * X_ROW * 2 + row % 2 * 8;

  // Beyond the rows of x and the outputs anything may be read, since it ends up in sums that nobody asks for.
  // This warp's turns: whole groups, or else as many as are on their way.
  constexpr int PART_TURNS = PALETTE && GROUPED ? GROUP_CODES / UNIT_CODES / SHARES : SPAN;
  static_assert(PART_TURNS % SPAN == 0, "a group must end where a span ends");
  constexpr int SHARERS = K_BLOCKS * K_WARPS;
  constexpr long long NEXT_PART = ((SHARERS - 1) * PART_TURNS + SPAN) * NEXT_TURN;
  const unsigned* from;
  const unsigned short* x_from[TILES_N];  // where this lane's values of the turn begin, in its row of each tile
  auto out_of = [&](int block) { return block * BLOCK_OUTS + out_warp * OUTS + row * columns; };
  auto start_of = [&](int block) {
    return unit_at(words, sharer * PART_TURNS * SHARES + quad, out_of(block), columns);
  };
  auto read = [&](auto mine, int s, int turn, int block) {
    constexpr int COUNT = decltype(mine)::COUNT;
    read_unit<EXACT, COUNT>(codes[s], from + s * NEXT_TURN, (turn + s) * SHARES + quad, out_of(block));
  };

  // Eight values of one output, two to a register.
  auto decode = [&](int s, int chunk, int column, int stage, int group, unsigned (&values)[4]) {
    if constexpr (CENTERED) {
      constexpr unsigned BASE = BFLOAT ? 0x43004300 : 0x64006400;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (BITS == 8) {
          const unsigned word = codes[s][chunk * 2 + i / 2][column], first = i % 2 * 2;
          if constexpr (BFLOAT) {
            const float low = __uint_as_float(__byte_perm(word, 0x4b000000, 0x7540 | first));
            const float high = __uint_as_float(__byte_perm(word, 0x4b000000, 0x7540 | (first + 1)));
            constexpr float INVERSE = 1.f / MIDDLE, LESS = (8388608.f + MIDDLE) * INVERSE;
            values[i] = two_halves<true>(fmaf(low, INVERSE, -LESS), fmaf(high, INVERSE, -LESS));
          } else {
            values[i] = centered(__byte_perm(word, BASE, 0x7170 | first * 0x101));
          }
        } else if constexpr (BITS == 4) {
          values[i] = centered(masked_or(codes[s][chunk][column] >> 4 * i, 0x000f000f, BASE));
        } else {
          values[i] = centered(field_of<BITS>(codes[s], column, (chunk * 8 + 2 * i) * BITS, 0) |
                               field_of<BITS>(codes[s], column, (chunk * 8 + 2 * i + 1) * BITS, 16) | BASE);
        }
      }
    } else if constexpr (AFFINE) {
      const int out = first_out + row * columns + column;
      const float step = decoder.scale(group, out), zero = decoder.zero(group, out);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float two[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const unsigned code = field_of<BITS>(codes[s], column, (chunk * 8 + 2 * i + j) * BITS, 0);
          two[j] = (__uint_as_float(0x4b000000 | code) - 8388608.f - zero) * step;
        }
        values[i] = two_halves<BFLOAT>(two[0], two[1]);
      }
    } else if constexpr (PALETTE) {
      unsigned mine[UNIT_WORDS];
#pragma unroll
      for (int i = 0; i < UNIT_WORDS; ++i) mine[i] = codes[s][i][column];
      // A selector of four bytes is half a register.
      const unsigned all = nibbles(mine, chunk), below = WIDE ? all & 0x77777777 : all;
      const unsigned above = WIDE ? masked_or(all >> 1, 0x44444444, 0x32103210) : 0;
      const unsigned lower[2] = {below, upper_half(below)}, upper[2] = {above, upper_half(above)};
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        unsigned bytes[2];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const unsigned* from = entries[column] + b * (WIDE ? 4 : 2);
          bytes[b] = permuted(from[0], from[1], lower[side]);
          if constexpr (WIDE) bytes[b] = permuted(bytes[b], permuted(from[2], from[3], lower[side]), upper[side]);
        }
        values[side * 2] = permuted(bytes[0], bytes[1], 0x5140),
                      values[side * 2 + 1] = permuted(bytes[0], bytes[1], 0x7362);
      }
    } else {
      constexpr int SHIFT = TABLE ? log2_of(STRIDE) : 0;
      const unsigned copy = TABLE ? lane % LANES_APART * CELL : 0;
#pragma unroll
      for (int i = 0; i < 8 / DIM; ++i) {
        const int at = (chunk * 8 / DIM + i) * BITS;
        unsigned offset;
        if constexpr (BITS == 8 && STRIDE == 256)
          offset = __byte_perm(codes[s][at / 32][column * STAGES + stage], copy, 0x7704 | at % 32 / 8 << 4);
        else offset = field_of<BITS>(codes[s], column * STAGES + stage, at, SHIFT) | copy;
        const void* from = TABLE ? static_cast<const void*>(memory + stage * COPIES * CELL + offset)
                                 : static_cast<const char*>(vectors) +
                                       ((long long)stage * ENTRIES + min((int)offset, ENTRIES - 1)) * CELL;
        if constexpr (DIM == 8) {
          const uint4 all = TABLE ? *static_cast<const uint4*>(from) : __ldg(static_cast<const uint4*>(from));
          values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
        } else if constexpr (DIM == 4) {
          const uint2 all = TABLE ? *static_cast<const uint2*>(from) : __ldg(static_cast<const uint2*>(from));
          values[i * 2] = all.x, values[i * 2 + 1] = all.y;
        } else {
          values[i] = TABLE ? *static_cast<const unsigned*>(from) : __ldg(static_cast<const unsigned*>(from));
        }
      }
    }
  };

  // The sum over all stages.
  auto decode_all = [&](int s, int chunk, int column, int group, unsigned (&values)[4]) {
    if constexpr (STAGES == 1) {
      decode(s, chunk, column, 0, group, values);
    } else {
      float sums[8] = {};
      for (int stage = 0; stage < STAGES; ++stage) {
        unsigned part[4];
        decode(s, chunk, column, stage, group, part);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i] += x_value((unsigned short)(part[i / 2] >> i % 2 * 16));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = two_halves<BFLOAT>(sums[2 * i], sums[2 * i + 1]);
    }
  };

  auto write = [&](int out, int input, uint4 eight) {
    if ((!EXACT && input >= INPUTS) || (OUTPUTS % BLOCK_OUTS != 0 && out >= OUTPUTS)) return;
    unsigned short* to = y + (long long)out * INPUTS + input;
    if constexpr (INPUTS % 8 == 0) {
      *reinterpret_cast<uint4*>(to) = eight;
    } else {
      const unsigned* two = reinterpret_cast<const unsigned*>(&eight);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (input + i < INPUTS) to[i] = (unsigned short)(two[i / 2] >> i % 2 * 16);
    }
  };
  // Where an eight waits, so that lanes write and read other banks.
  auto place_of = [](int item) { return item ^ item / 8 % PIECE; };
  // Decodes a turn and writes it out, for each column a piece of all rows and quads after the other.
  auto write_turn = [&](int s, int turn, int group) {
    uint4* staged = reinterpret_cast<uint4*>(memory + TABLE_BYTES) + warp * 32 * PIECE;
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
      for (int chunk = 0; chunk < UNIT_VALUES / 8; ++chunk) {
        unsigned a[4];
        decode_all(s, chunk, column, group, a);
        const uint4 eight = make_uint4(a[0], a[1], a[2], a[3]);
        if constexpr (PIECE == 1) {
          write(first_out + row * COLUMNS + column, (turn * SHARES + quad) * 8, eight);
        } else {
          staged[place_of(lane * PIECE + chunk % PIECE)] = eight;
          if (chunk % PIECE != PIECE - 1) continue;
          __syncwarp();
#pragma unroll
          for (int i = 0; i < PIECE; ++i) {
            const int item = i * 32 + lane, of_row = item / (SHARES * PIECE);
            const int of_quad = item / PIECE % SHARES, eighth = item % PIECE;
            write(first_out + of_row * COLUMNS + column,
                  (turn * SHARES + of_quad) * UNIT_VALUES + (chunk - PIECE + 1 + eighth) * 8, staged[place_of(item)]);
          }
          __syncwarp();
        }
      }
  };

  auto use = [&](auto mine, int s, int turn) {
    constexpr int TOGETHER = SPLIT ? 1 : 2;  // columns of a tile
    constexpr int TILES = decltype(mine)::COUNT / TOGETHER;
    const int unit = turn * SHARES + quad, group = GROUPED ? min(unit * UNIT_CODES / GROUP_CODES, FINEST - 1) : 0;
    if constexpr (EXPAND) {
      write_turn(s, turn, group);
      return;
    }
#pragma unroll
    for (int chunk = 0; chunk < UNIT_VALUES / 8; ++chunk) {
      unsigned b[TILES_N][4];
#pragma unroll
      for (int tile = 0; tile < TILES_N; ++tile)
        if constexpr (SPLIT) {
          const uint2 two = *reinterpret_cast<const uint2*>(my_x + unit * UNIT_VALUES * 2 + chunk * 16);
          b[0][0] = two.x, b[0][1] = two.y;
        } else {
          const int ahead = s * SHARES * UNIT_VALUES + chunk * 8;
          const uint4 all = crossed(eight_inputs<EXACT>(x_from[tile] + ahead, unit * UNIT_VALUES + chunk * 8));
          b[tile][0] = all.x, b[tile][1] = all.y, b[tile][2] = all.z, b[tile][3] = all.w;
        }
      if constexpr (CENTERED) {
        constexpr unsigned ONES = BFLOAT ? 0x3f803f80 : 0x3c003c00;
#pragma unroll
        for (int tile = 0; tile < TILES_N; ++tile)
#pragma unroll
          for (int i = 0; i < (SPLIT ? 2 : 4); i += 2)
            multiply(sums_of_x[tile], ONES, ONES, ONES, ONES, b[tile][i], b[tile][i + 1]);
      }
#pragma unroll
      for (int stage = 0; stage < STAGES; ++stage) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          unsigned a[TOGETHER][4] = {};
#pragma unroll
          for (int i = 0; i < TOGETHER; ++i) decode(s, chunk, TOGETHER * t + i, stage, group, a[i]);
          if constexpr (SPLIT) multiply(sums[t][0], a[0][0], a[0][1], a[0][2], a[0][3], b[0][0], b[0][1]);
          else
#pragma unroll
            for (int i = 0; i < 4; i += 2)
#pragma unroll
              for (int tile = 0; tile < TILES_N; ++tile)
                multiply(sums[t][tile], a[0][i], a[TOGETHER - 1][i], a[0][i + 1], a[TOGETHER - 1][i + 1], b[tile][i],
                         b[tile][i + 1]);
        }
      }
    }
  };

  auto load_palettes = [&](int group) {
    // Warps are in different groups at a time, or else have the same palettes.
    if constexpr (GROUPED) {
      __syncwarp();
      write_palettes<OUTS, 32>(palettes, decoder, group, first_out, lane);
      __syncwarp();
    } else {
      __syncthreads();
      write_palettes<BLOCK_OUTS, THREADS>(memory, decoder, 0, first_out - out_warp * OUTS, threadIdx.x);
      __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const uint4 all =
            *reinterpret_cast<const uint4*>(palettes + (row * columns + min(c, columns - 1)) * 32 + b * 16);
        unsigned* to = entries[c] + b * (WIDE ? 4 : 2);
        to[0] = all.x, to[1] = all.y;
        if constexpr (WIDE) to[2] = all.z, to[3] = all.w;
      }
  };

  from = start_of(first_block);
  with_columns([&](auto mine) {
#pragma unroll
    for (int s = 0; s < SPAN; ++s)
      if (sharer * PART_TURNS < TURNS) read(mine, s, sharer * PART_TURNS, first_block);
  });
  __syncwarp();  // else the compiler has these read after the table
  if constexpr (TABLE) write_table(memory, decoder);
  // Few rows of x are in shared memory, pairs 0 and 2 of eight values before pairs 1 and 3.
  if constexpr (X_BYTES > 0) {
    share_out<X_BYTES / 16>(threadIdx.x, [&](int i) {
      const uint4 all = crossed(eight_inputs<EXACT>(x, i / (X_ROW / 8), i % (X_ROW / 8) * 8));
      *reinterpret_cast<uint4*>(shared_x + i * 16) = make_uint4(all.x, all.z, all.y, all.w);
    });
  }
  if constexpr (TABLE) wait_for_all_but<0>();
  __syncthreads();
#pragma unroll 1
  for (int block = first_block; block < BLOCKS_OF_OUTS; block += blocks) {
    first_out = block * BLOCK_OUTS + out_warp * OUTS;
#pragma unroll
    for (int t = 0; t < TILES_M; ++t)
#pragma unroll
      for (int tile = 0; tile < TILES_N; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][tile][i] = 0;
#pragma unroll
    for (int tile = 0; tile < TILES_N; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums_of_x[tile][i] = 0;
    float steps[COLUMNS], zeros_of[COLUMNS];
    if constexpr (CENTERED)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        steps[c] = decoder.scale(0, first_out + row * columns + c) * MIDDLE;
        zeros_of[c] = decoder.zero(0, first_out + row * columns + c) / MIDDLE - 1;
      }
    const int next = block + blocks;
    const bool more = next < BLOCKS_OF_OUTS;
    if constexpr (PALETTE && !GROUPED) load_palettes(0);
    if constexpr (!SPLIT && !EXPAND)
#pragma unroll
      for (int tile = 0; tile < TILES_N; ++tile)
        x_from[tile] =
            x + (long long)min(tile * 8 + row, ROWS - 1) * INPUTS + (sharer * PART_TURNS * SHARES + quad) * UNIT_VALUES;
    with_columns([&](auto mine) {
#pragma unroll 1
      for (int turn = sharer * PART_TURNS; turn < TURNS;) {
        if constexpr (PALETTE && GROUPED)
          if (turn % PART_TURNS == 0) load_palettes(turn / PART_TURNS);
        const bool part_ends = (turn + SPAN) % PART_TURNS == 0;
        const int following = turn + SPAN + (part_ends ? (SHARERS - 1) * PART_TURNS : 0);
        const bool last = following >= TURNS;
        from = last ? start_of(next) : from + (part_ends ? NEXT_PART : SPAN * NEXT_TURN);
#pragma unroll
        for (int s = 0; s < SPAN; ++s) {
          use(mine, s, turn + s);
          if (!last || more) read(mine, s, last ? sharer * PART_TURNS : following, last ? next : block);
        }
        if constexpr (!SPLIT && !EXPAND)
#pragma unroll
          for (int tile = 0; tile < TILES_N; ++tile) x_from[tile] += (following - turn) * SHARES * UNIT_VALUES;
        turn = following;
      }
    });
    // What a sum of products is worth.
    auto scaled = [&](int column, float sum, float sum_of_x) {
      return CENTERED ? steps[column] * (sum - zeros_of[column] * sum_of_x) : sum;
    };
    if constexpr (!EXPAND) {
#pragma unroll
      for (int t = 0; t < TILES_M; ++t)
#pragma unroll
        for (int tile = 0; tile < TILES_N; ++tile) {
          float* to = shared_sums + k_warp * ROWS * SUMS_ROW + out_warp * OUTS + row * columns;
          if constexpr (SPLIT) {
            const float sum = sums[t][tile][0] + sums[t][tile][3], sum_of_x = sums_of_x[0][0] + sums_of_x[0][3];
            if (quad < ROWS && t < columns) to[quad * SUMS_ROW + t] = scaled(t, sum, sum_of_x);
          } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int n = tile * 8 + 2 * quad + i;
              const float first = scaled(2 * t, sums[t][tile][i], sums_of_x[tile][i]);
              const float second = scaled(2 * t + 1, sums[t][tile][i + 2], sums_of_x[tile][i]);
              if (n < ROWS && 2 * t < columns)
                *reinterpret_cast<float2*>(to + n * SUMS_ROW + 2 * t) = make_float2(first, second);
            }
          }
        }
      __syncthreads();
      write_products<SUMS_ROW>(y, shared_sums, block * BLOCK_OUTS);
      __syncthreads();
    }
  }
}
