// The best codebook of each row of ascending values: dynamic programming over a grid of cuts, then Lloyd's iteration.
//
// A block of threads does one row after another. Sums are float64, so that their differences keep their digits.
//
// Compiled with: ENTRIES (k), GRID (intervals between candidate cuts), ROUNDS (of both), WEIGHTED (0 or 1),
// ITERATIONS (at most), THREADS.

struct Moments {
  double mass, first, second;
};

__device__ __forceinline__ Moments operator-(const Moments& a, const Moments& b) {
  return {a.mass - b.mass, a.first - b.first, a.second - b.second};
}

__device__ __forceinline__ Moments operator+(const Moments& a, const Moments& b) {
  return {a.mass + b.mass, a.first + b.first, a.second + b.second};
}

// The squared error of one centroid. A rounded mean does: the error is least at the exact one, and flat there.
__device__ __forceinline__ double error(const Moments& part) {
  const double mean = part.mass > 0 ? __fdividef((float)part.first, (float)part.mass) : 0;
  return fmax(part.second - mean * (2 * part.first - mean * part.mass), 0.0);
}

// The moments about `origin` of values [from, to), summed by the lanes of a warp.
__device__ Moments sum_by_warp(const float* __restrict__ values, const float* __restrict__ weights, double origin,
                               int from, int to) {
  Moments sum = {0, 0, 0};
  for (int i = from + (int)(threadIdx.x % 32); i < to; i += 32) {
    const double x = values[i] - origin, w = WEIGHTED ? weights[i] : 1;
    sum.mass += w, sum.first += w * x, sum.second += w * x * x;
  }
#pragma unroll
  for (int step = 16; step; step /= 2) {
    sum.mass += __shfl_xor_sync(0xffffffff, sum.mass, step);
    sum.first += __shfl_xor_sync(0xffffffff, sum.first, step);
    sum.second += __shfl_xor_sync(0xffffffff, sum.second, step);
  }
  return sum;
}

// How many of the ascending values are at most `limit`; the lanes of a warp look at 32 places at a time.
__device__ int count_up_to(const float* __restrict__ values, int count, double limit) {
  int low = 0, high = count;  // the answer is in [low, high]
  while (low < high) {
    const int stride = (high - low + 31) / 32, place = low + stride * (int)(threadIdx.x % 32 + 1) - 1;
    const bool below = place < high && values[place] <= limit;
    const int passed = __popc(__ballot_sync(0xffffffff, below));
    low += passed * stride;
    high = min(high, low + stride - 1);
  }
  return low;
}

// values, weights: [rows, length]; edges: [rows, GRID + 1] candidate cuts from 0 to count; sizes: rows and values that
// count, length. choices: [blocks, ENTRIES, GRID + 1], room for where the last cluster of each layer starts.
extern "C" __global__ void __launch_bounds__(THREADS) palette(
    const float* __restrict__ all_values, const float* __restrict__ all_weights, const int* __restrict__ all_edges,
    const int* __restrict__ sizes, float* __restrict__ codebooks, unsigned short* __restrict__ all_choices) {
  extern __shared__ double memory[];
  Moments* before = reinterpret_cast<Moments*>(memory);  // of all values below each edge
  double* least = memory + 3 * (GRID + 1);               // [2, GRID + 1]
  int* edges = reinterpret_cast<int*>(memory + 5 * (GRID + 1));
  __shared__ Moments at_cut[ENTRIES + 1];
  __shared__ double centroids[ENTRIES];
  __shared__ int cuts[ENTRIES + 1];
  __shared__ int moved;

  const int warp = threadIdx.x / 32, warps = THREADS / 32, count = sizes[1];
  unsigned short* choices = all_choices + (long long)blockIdx.x * ENTRIES * (GRID + 1);

  for (int row = blockIdx.x; row < sizes[0]; row += gridDim.x) {
    const float* values = all_values + (long long)row * sizes[2];
    const float* weights = all_weights + (WEIGHTED ? (long long)row * sizes[2] : 0);
    const int* first_edges = all_edges + (long long)row * (GRID + 1);
    const double origin = values[count / 2];
    for (int edge = threadIdx.x; edge <= GRID; edge += THREADS) edges[edge] = first_edges[edge];
    __syncthreads();
    for (int round = 0; round < ROUNDS; ++round) {
      if (round) {  // the next candidates lie around the cuts, the closer the denser, up to half the way to the next
        const int per_cut = GRID / ENTRIES, half = per_cut / 2;
        for (int edge = threadIdx.x; edge <= GRID; edge += THREADS) {
          const int cut = min((edge + half) / per_cut, ENTRIES), step = edge - cut * per_cut;
          const int way = step < 0 ? cuts[cut] - cuts[cut - 1] : cut < ENTRIES ? cuts[cut + 1] - cuts[cut] : 0;
          const int distance = max((int)((long long)way * step * step / (2 * half * half)), min(abs(step), way / 2));
          edges[edge] = step < 0 ? cuts[cut] - distance : cuts[cut] + distance;
        }
        __syncthreads();
      }
      for (int bin = warp; bin < GRID; bin += warps) {
        const Moments sum = sum_by_warp(values, weights, origin, edges[bin], edges[bin + 1]);
        if (threadIdx.x % 32 == 0) before[bin + 1] = sum;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        before[0] = {0, 0, 0};
        for (int bin = 0; bin < GRID; ++bin) before[bin + 1] = before[bin + 1] + before[bin];
      }
      __syncthreads();

      for (int end = threadIdx.x; end <= GRID; end += THREADS) least[end] = error(before[end]), choices[end] = 0;
      __syncthreads();
      for (int layer = 1; layer < ENTRIES; ++layer) {
        const double* last = least + (layer - 1) % 2 * (GRID + 1);
        double* now = least + layer % 2 * (GRID + 1);
        for (int end = threadIdx.x; end <= GRID; end += THREADS) {
          double best = last[end];  // an empty cluster
          int choice = end;
          // With one cluster more the last one starts no earlier.
          for (int start = choices[(layer - 1) * (GRID + 1) + end]; start < end; ++start) {
            const double total = last[start] + error(before[end] - before[start]);
            if (total < best) best = total, choice = start;
          }
          now[end] = best;
          choices[layer * (GRID + 1) + end] = choice;
        }
        __syncthreads();
      }
      if (threadIdx.x == 0) {
        int end = GRID;
        for (int layer = ENTRIES; layer > 0; --layer) {
          cuts[layer] = edges[end], at_cut[layer] = before[end];
          end = choices[(layer - 1) * (GRID + 1) + end];
        }
        cuts[0] = 0, at_cut[0] = {0, 0, 0};
      }
      __syncthreads();

      for (int iteration = 0;; ++iteration) {
        for (int entry = threadIdx.x; entry < ENTRIES; entry += THREADS) {
          const Moments part = at_cut[entry + 1] - at_cut[entry];
          const double low = values[max(min(cuts[entry], count - 1), 0)] - origin;
          const double high = values[max(cuts[entry + 1] - 1, 0)] - origin;
          // What is left of sums and differences may be no mean of its values.
          centroids[entry] = part.mass > 0 ? fmax(low, fmin(part.first / part.mass, high)) : low;
        }
        if (threadIdx.x == 0) moved = 0;
        __syncthreads();
        if (iteration == ITERATIONS) break;
        for (int cut = 1 + warp; cut < ENTRIES; cut += warps) {
          const double middle = origin + (centroids[cut - 1] + centroids[cut]) / 2;
          const int from = cuts[cut], to = count_up_to(values, count, middle);
          const Moments between = sum_by_warp(values, weights, origin, min(from, to), max(from, to));
          if (threadIdx.x % 32 == 0 && from != to) {
            at_cut[cut] = from < to ? at_cut[cut] + between : at_cut[cut] - between;
            cuts[cut] = to;
            moved = 1;
          }
        }
        __syncthreads();
        if (!moved) break;
        __syncthreads();
      }
      __syncthreads();
    }
    float* codebook = codebooks + (long long)row * ENTRIES;
    for (int entry = threadIdx.x; entry < ENTRIES; entry += THREADS) codebook[entry] = origin + centroids[entry];
    __syncthreads();
  }
}
