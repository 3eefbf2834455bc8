// The operations of this module, for Core.add_extension.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <vector>

#include "op/crush_attention.hpp"
#include "op/crush_product.hpp"
#include "op/crush_scores.hpp"

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<crush::CrushAttention>>(),
                                                            std::make_shared<ov::OpExtension<crush::CrushProduct>>(),
                                                            std::make_shared<ov::OpExtension<crush::CrushScores>>()}));
