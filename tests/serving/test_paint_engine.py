"""Images of many requests: a seed gives the same image whatever is drawn at the same time."""

from viscpm_hf import VisCPMPaint, tiny
from viscpm_hf.paint.painting import PaintRequest
from viscpm_hf.serving.paint_engine import Drawing, DrawingSettings, PaintEngine


def test_equal_seeds_give_equal_images_also_beside_other_requests():
    painter = VisCPMPaint(
        tiny("paint"), image_safety_checker=False, prompt_safety_checker=False, add_ranker=False, device="cpu"
    )
    engine = PaintEngine(painter)

    def draw(seed: int, is_repeatable: bool = True) -> Drawing:
        request = PaintRequest("a red circle", seed=seed)
        return engine.submit(Drawing(request, DrawingSettings(steps=3), is_repeatable=is_repeatable))

    def pixels(drawing: Drawing) -> bytes:
        return drawing.result.result(timeout=120).images[0].tobytes()

    alone = [pixels(draw(seed)) for seed in range(6)]
    together = []
    for seed in range(6):
        together.append(draw(seed))
        draw(100 + seed, is_repeatable=False)
    assert [pixels(drawing) for drawing in together] == alone
    assert engine.close()
