// Python module _planner: the tile configurations, their selection, index maps of the device layout
// and of the rotation, and build facts. Plain host code: builds and runs without torch, CUDA or a
// GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gemm/config.h"
#include "gemm/plan_a16.h"
#include "gemm/schedule_sm90.h"
#include "layout/packed_weight.h"
#include "rotate/rotate_quantize.h"

#ifndef LRQ_CUDA_ARCHS
#define LRQ_CUDA_ARCHS ""  // a build without nvcc has no kernels
#endif

namespace py = pybind11;

namespace lrq {
namespace {

void check_range(const char* what, int64_t value, int64_t end) {
  if (value < 0 || value >= end) {
    throw std::invalid_argument(std::string("_planner: ") + what + " must be in [0, " +
                                std::to_string(end) + "), got " + std::to_string(value));
  }
}

void check_bits(int bits) {
  if (!is_weight_bits(bits)) {
    throw std::invalid_argument("_planner: weight_bits must be 2, 3 or 4, got " +
                                std::to_string(bits));
  }
}

std::string describe(const GemmConfig& config) {
  std::ostringstream text;
  text << "GemmConfig(name='" << config.name << "', arch=" << config.arch
       << ", tile_m=" << config.tile_m << ", tile_n=" << config.tile_n
       << ", tile_k=" << config.tile_k << ", warps_n=" << config.warps_n
       << ", warps_m=" << config.warps_m << ", stages=" << config.stages
       << ", blocks_per_sm=" << config.blocks_per_sm << ", cluster=" << config.cluster
       << ", split_k=" << config.split_k << ")";
  return text.str();
}

// "80;89;90a" -> ["80", "89", "90a"]
std::vector<std::string> compiled_archs() {
  std::vector<std::string> archs;
  std::istringstream list(LRQ_CUDA_ARCHS);
  for (std::string arch; std::getline(list, arch, ';');) {
    if (!arch.empty()) {
      archs.push_back(arch);
    }
  }
  return archs;
}

// (first token, tokens, group of channel tiles)
using WalkedTile = std::tuple<int, int, int>;

std::vector<std::vector<WalkedTile>> walks(const GemmConfig& config, const GemmProblem& problem,
                                           int sms) {
  if (!is_sm90(config) || sms < 1 || problem.m < 1 || problem.n < 1) {
    throw std::invalid_argument(
        "_planner.walks: needs a configuration of arch 90, sizes and SMs from 1 on, got " +
        describe(config) + ", " + std::to_string(problem.m) + " x " + std::to_string(problem.n) +
        " and " + std::to_string(sms) + " SMs");
  }
  const TileSchedule schedule = make_schedule(config, problem, sms);
  std::vector<std::vector<WalkedTile>> all(schedule.clusters);
  for (uint32_t cluster = 0; cluster < schedule.clusters; ++cluster) {
    for (TileWalk walk(schedule, cluster); !walk.done(); walk.advance()) {
      all[cluster].emplace_back(walk.m_tile() * config.tile_m, config.tile_m, walk.group());
    }
    if (cluster < schedule.tail_tiles) {
      const TailPart tail = tail_part(schedule, cluster);
      const int tokens = config.tile_m / schedule.tail_parts;
      all[cluster].emplace_back(tail.m_tile * config.tile_m + tail.part * tokens, tokens,
                                tail.group);
    }
  }
  return all;
}

void bind_gemm(py::module_& m) {
  py::class_<GemmConfig>(m, "GemmConfig")
      .def_readonly("name", &GemmConfig::name)
      .def_readonly("arch", &GemmConfig::arch)
      .def_readonly("tile_m", &GemmConfig::tile_m)
      .def_readonly("tile_n", &GemmConfig::tile_n)
      .def_readonly("tile_k", &GemmConfig::tile_k)
      .def_readonly("warps_n", &GemmConfig::warps_n)
      .def_readonly("warps_m", &GemmConfig::warps_m)
      .def_readonly("stages", &GemmConfig::stages)
      .def_readonly("blocks_per_sm", &GemmConfig::blocks_per_sm)
      .def_readonly("cluster", &GemmConfig::cluster)
      .def_readonly("split_k", &GemmConfig::split_k)
      .def(
          "shared_bytes",
          [](const GemmConfig& config, int weight_bits) {
            check_bits(weight_bits);
            return shared_bytes(config, weight_bits);
          },
          py::arg("weight_bits"))
      .def(
          "is_legal",
          [](const GemmConfig& config, int64_t m, int64_t n, int64_t k, int bits, int arch) {
            return is_legal(config, {m, n, k, bits}, arch);
          },
          py::arg("m"), py::arg("n"), py::arg("k"), py::arg("weight_bits"), py::arg("arch"))
      .def("__repr__", &describe);

  m.def(
      "gemm_configs",
      [] { return std::vector<GemmConfig>(std::begin(kGemmConfigs), std::end(kGemmConfigs)); },
      "Every compiled GEMM configuration; its place in the list is the config of "
      "lrq::gemm_config.");
  m.def(
      "select",
      [](int64_t m, int64_t n, int64_t k, int weight_bits, int arch, bool sm90) {
        return select_gemm_config({m, n, k, weight_bits}, arch, sm90);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("weight_bits"), py::arg("arch"),
      py::arg("sm90") = true,
      "The configuration that lrq::gemm runs. arch is 10 * major + minor; sm90 says whether rows "
      "of the Hopper kernel are considered. ValueError where none can.");
  m.def(
      "walks",
      [](const GemmConfig& config, int64_t m, int64_t n, int64_t k, int bits, int sms) {
        check_bits(bits);
        return walks(config, {m, n, k, bits}, sms);
      },
      py::arg("config"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("weight_bits"),
      py::arg("sms"),
      "Of each cluster of the Hopper kernel the tiles in turn: (first token, tokens, group), a "
      "group being config.cluster * config.tile_n channels.");
  m.def("max_shared_bytes", &max_shared_bytes, py::arg("arch"));
  m.attr("OLDEST_ARCH") = kOldestArch;
  m.attr("GEMV_MAX_TOKENS") = kGemvMaxTokens;
  m.def(
      "a16_tile",
      [](int64_t m, int64_t n, int64_t k, int weight_bits, int sms) {
        return choose_a16_tile({m, n, k, weight_bits}, sms);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("weight_bits"), py::arg("sms"),
      "The tile, a place in a16_tiles(), that lrq::gemm_a16 takes on Hopper for more than "
      "GEMV_MAX_TOKENS rows, -1 where it dequantizes the weight instead.");
  m.def(
      "a16_tiles",
      [] {
        std::vector<std::pair<int, int>> tiles;
        for (const A16TileSize& tile : kA16Tiles) {
          tiles.emplace_back(tile.tokens, tile.channels);
        }
        return tiles;
      },
      "(tokens, channels) of every tile of lrq::gemm_a16.");
}

void bind_layout(py::module_& m) {
  m.attr("TILE_CHANNELS") = kTileChannels;
  m.attr("TILE_INPUTS") = kTileInputs;
  m.attr("HALF_TILE_CHANNELS") = kHalfTileChannels;
  m.attr("HALF_TILE_LANES") = kHalfTileLanes;
  m.attr("SLICES") = kSlices;
  m.attr("ROWS_PER_LANE") = kRowsPerLane;
  m.attr("POSITIONS") = kPositions;
  m.def(
      "words_per_lane", [](int bits) { return check_bits(bits), words_per_lane(bits); },
      py::arg("weight_bits"));
  m.def(
      "half_tile_words", [](int bits) { return check_bits(bits), half_tile_words(bits); },
      py::arg("weight_bits"));

  m.def(
      "lane_to_nk",
      [](int lane, int slice, int row, int position) {
        check_range("lane", lane, kHalfTileLanes);
        check_range("slice", slice, kSlices);
        check_range("row", row, kRowsPerLane);
        check_range("position", position, kPositions);
        const HalfTileNK nk = lane_to_nk({lane, slice, row, position});
        return std::make_tuple(nk.channel, nk.k);
      },
      py::arg("lane"), py::arg("slice"), py::arg("row"), py::arg("position"),
      "(channel 0..63, k 0..127) in a half tile.");
  m.def(
      "nk_to_lane",
      [](int channel, int k) {
        check_range("channel", channel, kHalfTileChannels);
        check_range("k", k, kTileInputs);
        const LaneSlot slot = nk_to_lane({channel, k});
        return std::make_tuple(slot.lane, slot.slice, slot.row, slot.position);
      },
      py::arg("channel"), py::arg("k"), "(lane, slice, row, position).");
  m.def(
      "slot_to_lane_bit",
      [](int bits, int slice, int row, int position, int plane) {
        check_bits(bits);
        check_range("slice", slice, kSlices);
        check_range("row", row, kRowsPerLane);
        check_range("position", position, kPositions);
        check_range("plane", plane, bits);
        const LaneBit at = slot_to_lane_bit(bits, {0, slice, row, position}, plane);
        return std::make_tuple(at.word, at.bit);
      },
      py::arg("weight_bits"), py::arg("slice"), py::arg("row"), py::arg("position"),
      py::arg("plane"), "(word of the lane, bit) of bit `plane` of a code.");
  m.def(
      "lane_bit_to_slot",
      [](int bits, int word, int bit) {
        check_bits(bits);
        check_range("word", word, words_per_lane(bits));
        check_range("bit", bit, 32);
        const SlotBit at = lane_bit_to_slot(bits, 0, {word, bit});
        return std::make_tuple(at.slot.slice, at.slot.row, at.slot.position, at.plane);
      },
      py::arg("weight_bits"), py::arg("word"), py::arg("bit"), "(slice, row, position, plane).");
  m.def(
      "lane_word_to_offset",
      [](int bits, int lane, int word) {
        check_bits(bits);
        check_range("lane", lane, kHalfTileLanes);
        check_range("word", word, words_per_lane(bits));
        return lane_word_to_offset(bits, lane, word);
      },
      py::arg("weight_bits"), py::arg("lane"), py::arg("word"), "Word offset in the half tile.");
  m.def(
      "offset_to_lane_word",
      [](int bits, int offset) {
        check_bits(bits);
        check_range("offset", offset, half_tile_words(bits));
        const LaneWord at = offset_to_lane_word(bits, offset);
        return std::make_tuple(at.lane, at.word);
      },
      py::arg("weight_bits"), py::arg("offset"), "(lane, word of the lane).");
  m.def(
      "nk_to_offset",
      [](int bits, int64_t n, int64_t k, int plane, int64_t k_tiles) {
        check_bits(bits);
        check_range("n", n, INT64_MAX);
        check_range("plane", plane, bits);
        check_range("k", k, k_tiles * kTileInputs);
        const PackedBit at = nk_to_offset(bits, n, k, plane, k_tiles);
        return std::make_tuple(at.word, at.bit);
      },
      py::arg("weight_bits"), py::arg("n"), py::arg("k"), py::arg("plane"), py::arg("k_tiles"),
      "(word, bit) of bit `plane` of code (n, k) in the whole packed weight.");
  m.def(
      "half_tile_to_nk",
      [](int64_t half_tile, int64_t k_tiles) {
        check_range("half_tile", half_tile, INT64_MAX);
        check_range("k_tiles - 1", k_tiles - 1, INT64_MAX);
        const MatrixNK nk = half_tile_to_nk(half_tile, k_tiles);
        return std::make_tuple(nk.n, nk.k);
      },
      py::arg("half_tile"), py::arg("k_tiles"), "First (n, k) of a half tile.");
  m.def(
      "canonical_to_device_code",
      [](int bits, int code) {
        check_bits(bits);
        check_range("code", code, 1 << bits);
        return canonical_to_device_code(bits, code);
      },
      py::arg("weight_bits"), py::arg("code"));
  m.def(
      "device_to_canonical_code",
      [](int bits, int code) {
        check_bits(bits);
        check_range("code", code, 1 << bits);
        return device_to_canonical_code(bits, code);
      },
      py::arg("weight_bits"), py::arg("code"));
}

RotateForm rotate_form(const std::string& name) {
  if (name == "plain") {
    return RotateForm::kPlain;
  }
  if (name == "modulated") {
    return RotateForm::kModulated;
  }
  if (name == "norm") {
    return RotateForm::kNorm;
  }
  throw py::value_error("form must be 'plain', 'modulated' or 'norm', got '" + name + "'");
}

void check_team_tokens(const char* name, int tokens) {
  if (tokens != 1 && tokens != 2 && tokens != 4 && tokens != 8) {
    throw py::value_error(std::string(name) + " must be 1, 2, 4 or 8, got " +
                          std::to_string(tokens));
  }
}

template <typename Use>
std::pair<int, int> with_layout(int tokens, const Use& use) {
  check_team_tokens("tokens", tokens);
  switch (tokens) {
    case 1:
      return use(TeamLayout<1>());
    case 2:
      return use(TeamLayout<2>());
    case 4:
      return use(TeamLayout<4>());
    default:
      return use(TeamLayout<8>());
  }
}

void bind_rotate(py::module_& m) {
  m.attr("ROTATE_MAX_FEATURES") = kRotateMaxFeatures;
  m.def("supports_rotate_rows", &supports_rotate_rows, py::arg("first"), py::arg("second"),
        py::arg("block_size"), py::arg("row_stride"), py::arg("addresses"),
        "Whether lrq::_rotate_rows takes 16-bit rows of first + second features (second 0: one "
        "source), row_stride elements apart. addresses: bitwise or of the addresses of the sources "
        "and of channel_scale, and of the strides in bytes from row to row and from sample to "
        "sample.");
  py::class_<RotateRowsPlan>(m, "RotateRowsPlan")
      .def_readonly("team_threads", &RotateRowsPlan::team_threads)
      .def_readonly("teams", &RotateRowsPlan::teams)
      .def_readonly("slots", &RotateRowsPlan::slots)
      .def_readonly("blocks_per_sample", &RotateRowsPlan::blocks_per_sample)
      .def_readonly("shared_bytes", &RotateRowsPlan::shared_bytes)
      .def("fits", &RotateRowsPlan::fits, py::arg("shared_limit"));
  m.def(
      "plan_rotate_rows",
      [](int features, int64_t samples, int64_t tokens, int sms, int registers, bool modulated,
         int shared_limit) {
        check_range("features / 128 - 1", features / kTransform - 1,
                    kRotateMaxFeatures / kTransform);
        check_range("samples - 1", samples - 1, INT64_MAX);
        check_range("tokens - 1", tokens - 1, kRotateMaxTokens);
        return plan_rotate_rows(features, samples, tokens, sms, registers, modulated, shared_limit);
      },
      py::arg("features"), py::arg("samples"), py::arg("tokens"), py::arg("sms"),
      py::arg("registers"), py::arg("modulated"), py::arg("shared_limit"),
      "How lrq::_rotate_rows divides samples of so many tokens on a device.");
  m.def(
      "choose_group_tokens",
      [](int features, int64_t samples, int64_t tokens, int sms, const std::string& form) {
        check_range("features / 128 - 1", features / kTransform - 1,
                    kRotateMaxFeatures / kTransform);
        return choose_group_tokens(features, samples, tokens, sms, rotate_form(form));
      },
      py::arg("features"), py::arg("samples"), py::arg("tokens"), py::arg("sms"), py::arg("form"),
      "Tokens of a thread block of lrq::_rotate_rows, 1, 2, 4 or 8; 0: the kernel of rows. form: "
      "'plain', 'modulated' or 'norm'.");
  m.def(
      "group_warps",
      [](int group_tokens, int features) {
        check_team_tokens("group_tokens", group_tokens);
        return group_warps(group_tokens, features);
      },
      py::arg("group_tokens"), py::arg("features"), "Warps of a thread block of so many tokens.");
  m.def(
      "team_unit",
      [](int tokens, int thread) {
        check_range("thread", thread, kRotateMaxThreads);
        return with_layout(tokens, [&](auto layout) {
          return std::pair(layout.token(thread), layout.unit_k(thread));
        });
      },
      py::arg("tokens"), py::arg("thread"),
      "(token, first k) of the unit of 128 of which a thread holds a quarter; tokens: of a team.");
  m.def(
      "team_result",
      [](int tokens, int thread, int column) {
        check_range("thread", thread, kRotateMaxThreads);
        check_range("column", column, kColumns);
        return with_layout(tokens, [&](auto layout) {
          return std::pair(layout.result_token(thread, column), layout.result_k(thread, column));
        });
      },
      py::arg("tokens"), py::arg("thread"), py::arg("column"),
      "(token, first k) of the 16 results of a thread's column.");
  m.def(
      "lane_chunk_to_k",
      [](int lane, int chunk) {
        check_range("lane", lane, 32);
        check_range("chunk", chunk, kChunks);
        return lane_chunk_to_k(lane, chunk);
      },
      py::arg("lane"), py::arg("chunk"), "First k 0..1023 of the 8 that a lane loads as a chunk.");
  m.def(
      "lane_result_to_k",
      [](int lane, int column, int chunk) {
        check_range("lane", lane, 32);
        check_range("column", column, kColumns);
        check_range("chunk", chunk, kResultChunks);
        return lane_result_to_k(lane, column, chunk);
      },
      py::arg("lane"), py::arg("column"), py::arg("chunk"),
      "First k 0..1023 of the 8 results of a chunk of a lane's column.");
}

}  // namespace
}  // namespace lrq

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Tile configurations, their selection, device layout maps and build facts of lrq.";
  lrq::bind_gemm(m);
  lrq::bind_layout(m);
  lrq::bind_rotate(m);
  m.def("cuda_archs", &lrq::compiled_archs,
        "Architectures the CUDA kernels were compiled for; empty for a build without nvcc.");
}
