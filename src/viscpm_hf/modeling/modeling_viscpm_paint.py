"""VisCPM-Paint's text encoder: CPM-Bee, and a projection to what the UNet attends to (arXiv:2308.12038)."""

from dataclasses import dataclass

import torch
from torch import nn

# diffusers looks for `PreTrainedModel` here to know how the class is loaded.
from transformers import PreTrainedModel  # noqa: F401
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .compatibility import only_known_arguments
from .configuration_viscpm_paint import VisCPMPaintTextEncoderConfig
from .modeling_cpm_bee import CpmBeeModel, CpmBeePreTrainedModel


@dataclass
class VisCPMPaintTextEncoderOutput(ModelOutput):
    """
    Args:
        prompt_embeds (`torch.FloatTensor` of shape `(batch, sequence, projection_dim)`):
            what the UNet attends to, padding included.
        last_hidden_state (`torch.FloatTensor` of shape `(batch, sequence, hidden)`): of CPM-Bee, after its last norm.
        hidden_states, attentions: of CPM-Bee's layers, if asked for.
    """

    prompt_embeds: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class VisCPMPaintTextEncoder(CpmBeePreTrainedModel):
    """CPM-Bee as a text encoder. Takes what `CpmBeeTokenizer.collate` returns.

    A row of padding attends to nothing and nothing attends to it, so all such rows are one and the same vector. The
    original's UNet does see them.
    """

    config: VisCPMPaintTextEncoderConfig

    def __init__(self, config: VisCPMPaintTextEncoderConfig):
        super().__init__(config)
        self.model = CpmBeeModel(config)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.layer_norm = nn.LayerNorm(config.projection_dim, eps=config.projection_layer_norm_eps)
        self.post_init()

    @only_known_arguments
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        segment_relations: torch.LongTensor | None = None,
        extension_table: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisCPMPaintTextEncoderOutput:
        kwargs["use_cache"] = False  # nothing is generated
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            segment_ids=segment_ids,
            segment_relations=segment_relations,
            extension_table=extension_table,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return VisCPMPaintTextEncoderOutput(
            prompt_embeds=self.layer_norm(self.projection(outputs.last_hidden_state)),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["VisCPMPaintTextEncoder", "VisCPMPaintTextEncoderOutput"]
