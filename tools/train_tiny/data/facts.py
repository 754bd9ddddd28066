"""Capitals, and names of countries, languages, currencies and cities in English and Chinese.

Capitals are our own table; names come from Babel's CLDR data at run time. Invariant: a question has one right answer:
names that two entries share are left out.
"""

from collections import Counter
from functools import cache
from random import Random

from babel import Locale

from tools.train_tiny.data.example import Example, pick_language

# country en | country zh | capital en | capital zh
_CAPITAL_ROWS = """China|中国|Beijing|北京
Japan|日本|Tokyo|东京
South Korea|韩国|Seoul|首尔
North Korea|朝鲜|Pyongyang|平壤
Mongolia|蒙古|Ulaanbaatar|乌兰巴托
Vietnam|越南|Hanoi|河内
Thailand|泰国|Bangkok|曼谷
Laos|老挝|Vientiane|万象
Cambodia|柬埔寨|Phnom Penh|金边
Malaysia|马来西亚|Kuala Lumpur|吉隆坡
Indonesia|印度尼西亚|Jakarta|雅加达
Philippines|菲律宾|Manila|马尼拉
India|印度|New Delhi|新德里
Pakistan|巴基斯坦|Islamabad|伊斯兰堡
Bangladesh|孟加拉国|Dhaka|达卡
Nepal|尼泊尔|Kathmandu|加德满都
Iran|伊朗|Tehran|德黑兰
Iraq|伊拉克|Baghdad|巴格达
Saudi Arabia|沙特阿拉伯|Riyadh|利雅得
Turkey|土耳其|Ankara|安卡拉
Syria|叙利亚|Damascus|大马士革
Lebanon|黎巴嫩|Beirut|贝鲁特
Jordan|约旦|Amman|安曼
Kazakhstan|哈萨克斯坦|Astana|阿斯塔纳
Uzbekistan|乌兹别克斯坦|Tashkent|塔什干
Afghanistan|阿富汗|Kabul|喀布尔
France|法国|Paris|巴黎
Germany|德国|Berlin|柏林
Italy|意大利|Rome|罗马
Spain|西班牙|Madrid|马德里
Portugal|葡萄牙|Lisbon|里斯本
United Kingdom|英国|London|伦敦
Ireland|爱尔兰|Dublin|都柏林
Netherlands|荷兰|Amsterdam|阿姆斯特丹
Belgium|比利时|Brussels|布鲁塞尔
Switzerland|瑞士|Bern|伯尔尼
Austria|奥地利|Vienna|维也纳
Poland|波兰|Warsaw|华沙
Hungary|匈牙利|Budapest|布达佩斯
Romania|罗马尼亚|Bucharest|布加勒斯特
Bulgaria|保加利亚|Sofia|索非亚
Greece|希腊|Athens|雅典
Sweden|瑞典|Stockholm|斯德哥尔摩
Norway|挪威|Oslo|奥斯陆
Denmark|丹麦|Copenhagen|哥本哈根
Finland|芬兰|Helsinki|赫尔辛基
Iceland|冰岛|Reykjavik|雷克雅未克
Russia|俄罗斯|Moscow|莫斯科
Ukraine|乌克兰|Kyiv|基辅
Belarus|白俄罗斯|Minsk|明斯克
Serbia|塞尔维亚|Belgrade|贝尔格莱德
Croatia|克罗地亚|Zagreb|萨格勒布
Estonia|爱沙尼亚|Tallinn|塔林
Latvia|拉脱维亚|Riga|里加
Lithuania|立陶宛|Vilnius|维尔纽斯
Egypt|埃及|Cairo|开罗
Libya|利比亚|Tripoli|的黎波里
Tunisia|突尼斯|Tunis|突尼斯市
Algeria|阿尔及利亚|Algiers|阿尔及尔
Morocco|摩洛哥|Rabat|拉巴特
Sudan|苏丹|Khartoum|喀土穆
Ethiopia|埃塞俄比亚|Addis Ababa|亚的斯亚贝巴
Kenya|肯尼亚|Nairobi|内罗毕
Uganda|乌干达|Kampala|坎帕拉
Nigeria|尼日利亚|Abuja|阿布贾
Ghana|加纳|Accra|阿克拉
Senegal|塞内加尔|Dakar|达喀尔
Zambia|赞比亚|Lusaka|卢萨卡
Zimbabwe|津巴布韦|Harare|哈拉雷
Angola|安哥拉|Luanda|罗安达
Madagascar|马达加斯加|Antananarivo|塔那那利佛
Canada|加拿大|Ottawa|渥太华
United States|美国|Washington|华盛顿
Mexico|墨西哥|Mexico City|墨西哥城
Cuba|古巴|Havana|哈瓦那
Jamaica|牙买加|Kingston|金斯敦
Panama|巴拿马|Panama City|巴拿马城
Colombia|哥伦比亚|Bogota|波哥大
Venezuela|委内瑞拉|Caracas|加拉加斯
Ecuador|厄瓜多尔|Quito|基多
Peru|秘鲁|Lima|利马
Chile|智利|Santiago|圣地亚哥
Argentina|阿根廷|Buenos Aires|布宜诺斯艾利斯
Uruguay|乌拉圭|Montevideo|蒙得维的亚
Paraguay|巴拉圭|Asuncion|亚松森
Brazil|巴西|Brasilia|巴西利亚
Australia|澳大利亚|Canberra|堪培拉
New Zealand|新西兰|Wellington|惠灵顿
Fiji|斐济|Suva|苏瓦"""
CAPITALS = tuple(tuple(row.split("|")) for row in _CAPITAL_ROWS.split("\n"))
_LANGUAGES = (
    "zh en ja ko fr de es it pt ru ar hi bn th vi id ms tr fa he el nl sv no da fi pl cs sk hu ro bg uk sr hr la lt lv "
    "et is ga sw mn my km lo ne ta te ur uz kk ka hy"
)
_CURRENCIES = (
    "CNY USD EUR GBP JPY KRW HKD INR RUB THB VND IDR MYR PHP SGD AUD NZD CAD CHF SEK NOK DKK PLN CZK HUF TRY ILS SAR "
    "AED EGP ZAR KES NGN BRL MXN ARS CLP COP PEN MNT KZT UAH"
)
_TO_ZH = ('Translate "{}" into Chinese.', 'How do you say "{}" in Chinese?', "{} 用中文怎么说？", "把“{}”翻译成中文。")
_TO_EN = ("“{}”用英语怎么说？", "把“{}”翻译成英文。", "“{}”的英文是什么？", "Translate “{}” into English.")


def sample_capital(rng: Random) -> Example:
    """A country's capital, or the country of a capital."""
    row = rng.choice(CAPITALS)
    language = pick_language(rng)
    country, capital = (row[0], row[2]) if language == "en" else (row[1], row[3])
    if rng.random() < 0.65:
        forms = {
            "en": ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."),
            "zh": ("{}的首都是哪里？", "{}的首都是哪个城市？", "请问{}的首都是什么？"),
        }[language]
        return _build(rng.choice(forms).format(country), capital, "capitals", language)
    forms = {
        "en": ("{} is the capital of which country?", "Which country has {} as its capital?"),
        "zh": ("{}是哪个国家的首都？", "哪个国家的首都是{}？"),
    }[language]
    return _build(rng.choice(forms).format(capital), country, "capitals", language)


def sample_translation(rng: Random) -> Example:
    """A name in the other language."""
    english, chinese = rng.choice(name_pairs())
    if rng.random() < 0.5:
        form = rng.choice(_TO_ZH)
        return _build(form.format(english), chinese, "translation", "zh" if "中文" in form else "en")
    form = rng.choice(_TO_EN)
    return _build(form.format(chinese), english, "translation", "en" if "English" in form else "zh")


@cache
def name_pairs() -> tuple[tuple[str, str], ...]:
    """(English, Chinese) names, unambiguous both ways."""
    en, zh = Locale("en"), Locale("zh", script="Hans")
    codes = [code for code in en.territories if len(code) == 2 and code.isalpha() and code not in ("XA", "XB", "ZZ")]
    pairs = [(en.territories[c], zh.territories[c]) for c in sorted(codes) if c in zh.territories]
    pairs += [(en.languages[c], zh.languages[c]) for c in _LANGUAGES.split() if c in zh.languages]
    pairs += [(en.currencies[c], zh.currencies[c]) for c in _CURRENCIES.split() if c in zh.currencies]
    pairs += [(row[2], row[3]) for row in CAPITALS]
    pairs += _cities(zh)
    pairs = list(dict.fromkeys(p for p in pairs if p[0] != p[1] and "(" not in p[0] and "(" not in p[1]))
    english, chinese = Counter(p[0] for p in pairs), Counter(p[1] for p in pairs)
    return tuple(p for p in pairs if english[p[0]] == 1 and chinese[p[1]] == 1)


def _cities(zh: Locale) -> list[tuple[str, str]]:
    """City names from the time-zone table, large regions only."""
    regions = ("Asia/", "Europe/", "Australia/")
    rows = []
    for zone, info in sorted(zh.time_zones.items()):
        if zone.startswith(regions) and zone.count("/") == 1 and "city" in info:
            rows.append((zone.split("/")[1].replace("_", " "), info["city"]))
    return rows


def _build(prompt: str, answer: str, category: str, language: str) -> Example:
    return Example(prompt=prompt, answer=answer, category=category, language=language)
