// The order in which the blocks of the Hopper GEMM walk over output tiles: host and device.
//
// The unit is the tile of a whole cluster: `cluster` channel tiles side by side (a group) times one
// token tile. Groups run in bands; within a band groups are fastest, then token tiles, then bands:
//
//     band 0 (groups 0..2)        band 1 (ragged: groups 3, 4)
//     m = 0   0  1  2             m = 0    9 10
//     m = 1   3  4  5             m = 1   11 12
//     m = 2   6  7  8             m = 2   13 14
//
// Cluster c takes tiles c, c + clusters, c + 2 clusters, ... A step of `clusters` is step_m rows
// and step_n groups of a full band, so the next tile is found by additions; only the first tile,
// one in a new band and those of a ragged band cost a division.
//
// Where whole waves leave so few tiles that their parts of fewer tokens (sm90_tail) are no more
// than there are clusters, the walks end with the whole waves and each cluster takes one part at
// most:
//
//     clusters      0    1    2    3    4          7 tiles on 5 clusters, parts of half a tile
//     whole wave    0    1    2    3    4
//     tail          5'   5"   6'   6"   -
#pragma once

#include <cstdint>

#include "../int_math.h"
#include "config.h"

namespace lrq {

struct TileSchedule {
  uint32_t tiles;       // of clusters, that are walked over
  uint32_t clusters;    // that walk
  uint32_t tail_tiles;  // parts of further tiles, one a cluster
  int tail_parts;       // of one tile
  int tail_tokens;      // of a part
  int m_tiles;
  int groups;
  int band;    // groups of a full band
  int step_m;  // clusters / band
  int step_n;  // clusters % band
};

// Bands keep what a wave of blocks reads in L2 when W and X together do not fit there; otherwise
// one band of all groups reads X once.
inline TileSchedule make_schedule(const GemmConfig& config, const GemmProblem& problem, int sms) {
  constexpr int kBand = 16;
  constexpr int64_t kL2Bytes = 40 << 20;  // of 50 MiB on an H200, beside what Y takes
  TileSchedule schedule;
  schedule.m_tiles = static_cast<int>(ceil_div<int64_t>(problem.m, config.tile_m));
  schedule.groups = static_cast<int>(ceil_div<int64_t>(problem.n, config.tile_n)) / config.cluster;
  schedule.tiles = static_cast<uint32_t>(schedule.m_tiles) * static_cast<uint32_t>(schedule.groups);
  // Blocks that split K meet once; the others stay and walk.
  schedule.clusters = config.split_k > 1
                          ? schedule.tiles
                          : min_of<uint32_t>(max_of(sms / config.cluster, 1), schedule.tiles);
  const int64_t operands = problem.n * problem.k / 8 * problem.weight_bits + problem.m * problem.k;
  schedule.band = operands > kL2Bytes ? min_of(kBand, schedule.groups) : schedule.groups;
  schedule.step_m = static_cast<int>(schedule.clusters / schedule.band);
  schedule.step_n = static_cast<int>(schedule.clusters % schedule.band);
  const Sm90Tail tail = sm90_tail(config, schedule.tiles, schedule.clusters);
  schedule.tail_tokens = tail.tokens;
  schedule.tail_parts = tail.tiles > 0 ? config.tile_m / tail.tokens : 1;
  schedule.tail_tiles = static_cast<uint32_t>(tail.tiles) * schedule.tail_parts;
  schedule.tiles -= static_cast<uint32_t>(tail.tiles);
  return schedule;
}

// Tiles of one cluster's walk.
LRQ_HOST_DEVICE int tile_count(const TileSchedule& schedule, uint32_t cluster) {
  return static_cast<int>(ceil_div(schedule.tiles - cluster, schedule.clusters));
}

class TileWalk {
 public:
  // From a tile on: the number of the cluster, or one past those that are walked over.
  LRQ_HOST_DEVICE TileWalk(const TileSchedule& schedule, uint32_t tile)
      : schedule_(schedule), tile_(tile) {
    place();
  }

  LRQ_HOST_DEVICE bool done() const { return tile_ >= schedule_.tiles; }
  LRQ_HOST_DEVICE int m_tile() const { return m_; }
  LRQ_HOST_DEVICE int group() const { return first_ + n_; }

  LRQ_HOST_DEVICE void advance() {
    tile_ += schedule_.clusters;
    m_ += schedule_.step_m;
    n_ += schedule_.step_n;
    if (n_ >= schedule_.band) {
      n_ -= schedule_.band;
      ++m_;
    }
    if (m_ >= schedule_.m_tiles || ragged_) {
      place();
    }
  }

 private:
  LRQ_HOST_DEVICE void place() {
    const uint32_t band_tiles = static_cast<uint32_t>(schedule_.band) * schedule_.m_tiles;
    const uint32_t band = tile_ / band_tiles;
    const uint32_t within = tile_ - band * band_tiles;
    first_ = static_cast<int>(band) * schedule_.band;
    const int width = max_of(min_of(schedule_.band, schedule_.groups - first_), 1);
    ragged_ = width != schedule_.band;
    m_ = static_cast<int>(within / width);
    n_ = static_cast<int>(within % width);
  }

  const TileSchedule& schedule_;
  uint32_t tile_;
  int first_;  // group of the band
  int m_;
  int n_;
  bool ragged_;
};

// The part of the tail that a cluster below tail_tiles takes.
struct TailPart {
  int m_tile;
  int group;
  int part;
};

LRQ_HOST_DEVICE TailPart tail_part(const TileSchedule& schedule, uint32_t cluster) {
  const uint32_t tile = cluster / schedule.tail_parts;
  const TileWalk walk(schedule, schedule.tiles + tile);
  return {walk.m_tile(), walk.group(), static_cast<int>(cluster - tile * schedule.tail_parts)};
}

}  // namespace lrq
