"""What tests of the renderer share: renders in short, word files, small fonts whose glyphs are boxes."""

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from lmim_fast.config import RenderConfig
from lmim_fast.data.render.database import render
from lmim_fast.data.render.fonts import font_files
from lmim_fast.data.store.records import RecordStore

FONTS = {path.name: path for path in font_files(())}
DEJAVU = str(FONTS["DejaVuSans.ttf"])
PLAIN = dict(random_share=0.0, lines_share=0.0, curved_share=0.0, vertical_share=0.0, sign_share=0.0)


def records(folder):
    store = RecordStore([folder])
    return [(store.label(index), store.images([index])[0]) for index in range(len(store))]


def rendered(folder, **options):
    return records(render(RenderConfig(output=str(folder), processes=1, **options)))


def word_file(folder, *words):
    path = folder / "words.txt"
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    return str(path)


def box_font(path, family="Boxes", **boxes):
    """A font of 1000 units to the em; its glyphs are `uni4E2D=(left, bottom, right, top)`, None for empty."""
    names = [".notdef", *boxes]
    glyphs, advances = {}, {}
    for name in names:
        pen = TTGlyphPen(None)
        box = boxes.get(name)
        if box is not None:
            left, bottom, right, top = box
            for start, step in (((left, bottom), pen.moveTo), *(
                (corner, pen.lineTo) for corner in ((left, top), (right, top), (right, bottom))
            )):  # fmt: skip
                step(start)
            pen.closePath()
        glyphs[name] = pen.glyph()
        advances[name] = (1000, 0)
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({int(name[3:], 16): name for name in boxes})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(advances)
    builder.setupHorizontalHeader(ascent=880, descent=-120)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)
